"""Policy losses of token log-probs: what `fasttr_kernels.linear_policy_loss` calls, with torch
alone.

c: ratio of a token's probabilities, or exp of the mean log-ratio of its completion; A: advantage;
e, e_high: clip range.

Legend: t tokens, completion after completion, and n completions of a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fasttr.losses.advantages import k3

# What the summed loss of a step is divided by.
BY_OWN_LENGTH = ("grpo",)  # and by the completions
BY_TOKENS = ("bnpo", "ppo")  # of the step
BY_MEAN_TOKENS = ("dapo", "cispo")  # of a rollout's steps on average: all its tokens count alike
BY_LONGEST = ("dr_grpo",)  # completions times max_completion_length
BY_COMPLETIONS = ("luspo", "rloo")
LOSS_TYPES = (*BY_OWN_LENGTH, *BY_TOKENS, *BY_MEAN_TOKENS, *BY_LONGEST, *BY_COMPLETIONS)
LEVELS = ("token", "sequence")


class TokenInputs(NamedTuple):
    """Whole completions with what their rollout left."""

    logp: Tensor  # (t,)
    old_logp: Tensor | None  # (t,) when it was drawn; None: as now
    ref_logp: Tensor | None  # (t,) needed with beta
    advantage: Tensor  # (n,), or (t,) where every token has its own
    lengths: Tensor  # (n,) int64
    keep: Tensor  # (n,) 1, or 0 where the completion is left out

    def spread(self, x_n: Tensor) -> Tensor:
        """(t,) each completion's number at its tokens."""
        return x_n.repeat_interleave(self.lengths, output_size=len(self.logp))

    def sums(self, x_t: Tensor) -> Tensor:
        """(n,) over the tokens of each completion, added up in fp64."""
        sums = torch.segment_reduce(x_t.double(), "sum", lengths=self.lengths, initial=0.0)
        return sums.to(x_t.dtype)


class Ratios(NamedTuple):
    """c and A, both a token or both a completion."""

    ratio: Tensor
    advantage: Tensor
    by_token: bool


@dataclass(frozen=True)
class PolicyLoss:
    """The GRPO family (arXiv:2402.03300), RLOO (2402.14740) and PPO's policy term (1707.06347).

    grpo, bnpo, dapo, dr_grpo, luspo, ppo: -min(min(c, delta) A, clip(c, 1 - e, 1 + e_high) A) a
    token; cispo: -min(c, e_high) A logp, the ratio without gradient; rloo: as grpo with one ratio
    a completion, exp of its summed log-ratio. Nothing depends on a micro-batch: bnpo divides by the
    tokens of a step, dapo by those of its rollout over the rollout's steps. beta adds k3 to the
    first five and to cispo, times c with `use_bias_correction_kl`.
    """

    loss_type: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    max_completion_length: int = 512
    unpaired: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    completions: ClassVar[int] = 2
    needs_reference: ClassVar[bool] = True
    averages_tokens: ClassVar[bool] = False

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def reads_reference(self) -> bool:
        """Whether the loss itself, not only a reward, holds a KL term."""
        return self.beta > 0 and self.loss_type not in ("rloo", "ppo")

    @property
    def counts_rollout(self) -> bool:
        """Whether its tokens are those of a rollout, over its steps, and not the step's own."""
        return self.loss_type in BY_MEAN_TOKENS

    def normalizer(self, completions: int, tokens: float) -> float:
        """What the sum over a step's completions is divided by; `tokens` of those that are kept,
        see `counts_rollout`."""
        if self.loss_type in (*BY_TOKENS, *BY_MEAN_TOKENS):
            return float(max(tokens, 1))
        if self.loss_type in BY_LONGEST:
            return float(completions * self.max_completion_length)
        return float(completions)

    def __call__(self, inputs: TokenInputs) -> Tensor:
        """() the sum over the completions."""
        old_logp = inputs.logp.detach() if inputs.old_logp is None else inputs.old_logp
        log_ratio = inputs.logp - old_logp
        if self.loss_type == "rloo":
            clipped = self._clipped(inputs.sums(log_ratio).exp(), inputs.advantage)
            return (clipped * inputs.keep).sum()
        found = self.ratios(inputs, log_ratio)
        ratio_t = found.ratio if found.by_token else inputs.spread(found.ratio)
        advantage_t = found.advantage if found.by_token else inputs.spread(found.advantage)
        if self.loss_type == "cispo":
            loss_t = -ratio_t.clamp(max=self.high).detach() * advantage_t * inputs.logp
        else:
            loss_t = self._clipped(ratio_t, advantage_t)
        if self.beta > 0 and self.loss_type != "ppo":
            loss_t = loss_t + self.beta * self.kl(inputs, ratio_t)
        if self.loss_type in BY_OWN_LENGTH:
            loss_t = loss_t / inputs.spread(inputs.lengths)
        return (loss_t * inputs.spread(inputs.keep)).sum()

    def ratios(self, inputs: TokenInputs, log_ratio: Tensor) -> Ratios:
        """The ratios that are clipped, a token or a completion."""
        by_token = len(inputs.advantage) == len(inputs.logp) and self.loss_type == "ppo"
        if self.importance_sampling_level == "sequence":
            mean_n = inputs.sums(log_ratio) / inputs.lengths
            return Ratios(mean_n.exp(), inputs.advantage, by_token=False)
        advantage_t = inputs.advantage if by_token else inputs.spread(inputs.advantage)
        return Ratios(log_ratio.exp(), advantage_t, by_token=True)

    def kl(self, inputs: TokenInputs, ratio_t: Tensor) -> Tensor:
        """(t,) estimates of the KL to the reference."""
        assert inputs.ref_logp is not None
        kl_t = k3(inputs.logp, inputs.ref_logp)
        return kl_t * ratio_t if self.use_bias_correction_kl else kl_t

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        within = ratio.clamp(1 - self.epsilon, 1 + self.high)
        if self.delta is not None:
            ratio = ratio.clamp(max=self.delta)
        return -torch.minimum(ratio * advantage, within * advantage)


class Clipping(NamedTuple):
    """Of the ratios of a call: sums over those that are kept, and the extremes of completions."""

    low: Tensor  # () how many were below the range with a negative advantage
    high: Tensor  # () above it with a positive one
    kept: Tensor  # () how many were counted
    low_min: Tensor  # () smallest share of a completion
    high_max: Tensor  # ()


@torch.no_grad()
def clipping(loss: PolicyLoss, inputs: TokenInputs) -> Clipping:
    """How often the clip acts, as TRL counts it: tokens, or completions where they have one
    ratio."""
    old_logp = inputs.logp if inputs.old_logp is None else inputs.old_logp
    log_ratio = inputs.logp - old_logp
    if loss.loss_type == "rloo":
        found = Ratios(inputs.sums(log_ratio).exp(), inputs.advantage, by_token=False)
    else:
        found = loss.ratios(inputs, log_ratio)
    ratio = found.ratio if loss.delta is None else found.ratio.clamp(max=loss.delta)
    low_bound = 1 - loss.epsilon
    high_bound = loss.high if loss.loss_type == "cispo" else 1 + loss.high
    low = ((ratio < low_bound) & (found.advantage < 0)).to(inputs.logp.dtype)
    high = ((ratio > high_bound) & (found.advantage > 0)).to(inputs.logp.dtype)
    keep_n = inputs.keep.to(inputs.logp.dtype)
    if found.by_token:
        low_n, high_n = inputs.sums(low) / inputs.lengths, inputs.sums(high) / inputs.lengths
        weight = inputs.spread(keep_n)
    else:
        low_n, high_n, weight = low, high, keep_n
    is_kept = keep_n > 0
    return Clipping(
        low=(low * weight).sum(),
        high=(high * weight).sum(),
        kept=weight.sum(),
        low_min=torch.where(is_kept, low_n, torch.inf).min(),
        high_max=torch.where(is_kept, high_n, -torch.inf).max(),
    )
