"""Preference losses: a dozen lines each, on vectors of summed log-probs, with torch alone.

Names mean TRL's formulas. c, r are the summed log-probs (nats) of the chosen and rejected completion under the policy,
c0, r0 under the reference, n_c, n_r their token counts, s the logistic function, h = beta ((c - c0) - (r - r0)).

    from fasttr.losses import Scored, Sigmoid
    loss_P = Sigmoid(beta=0.1)(Scored(logp, ref_logp, tokens))   # chosen, rejected, chosen, rejected, ...

Legend: n completions, P pairs (or rows), m completions a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor


class Scored(NamedTuple):
    """Completions with their scores, row after row; the first of each row is the chosen one."""

    logp: Tensor  # (n,) policy, summed over completion tokens
    ref_logp: Tensor | None  # (n,) reference; None for a loss without one
    tokens: Tensor  # (n,) completion token counts
    per_row: int = 2  # m
    mean_chosen_tokens: float = 1.0  # over the whole optimizer step; read by `Sft` alone

    @property
    def chosen(self) -> Tensor:  # (P,) c
        return self.logp[:: self.per_row]

    @property
    def chosen_logratio(self) -> Tensor:  # (P,) c - c0
        return self._logratio[:: self.per_row]

    @property
    def rejected_logratio(self) -> Tensor:  # (P,) r - r0
        return self._logratio[1 :: self.per_row]

    @property
    def chosen_tokens(self) -> Tensor:  # (P,) n_c
        return self.tokens[:: self.per_row]

    @property
    def rejected_tokens(self) -> Tensor:  # (P,) n_r
        return self.tokens[1 :: self.per_row]

    @property
    def _logratio(self) -> Tensor:
        if self.ref_logp is None:
            raise ValueError("got no ref_logp; wanted the reference's log-probs, since this loss compares with it")
        return self.logp - self.ref_logp


class Loss(Protocol):
    """One number per row. `completions` is how many of a row's completions it reads."""

    needs_reference: ClassVar[bool]
    completions: ClassVar[int]

    @property
    def beta(self) -> float: ...

    def __call__(self, scored: Scored) -> Tensor: ...


@dataclass(frozen=True)
class Sigmoid:
    """DPO (arXiv:2305.18290, equation 7): -log s(h). At policy = reference: log 2."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    completions: ClassVar[int] = 2

    def __call__(self, scored: Scored) -> Tensor:
        return -F.logsigmoid(self.beta * (scored.chosen_logratio - scored.rejected_logratio))


@dataclass(frozen=True)
class Ipo:
    """IPO (arXiv:2310.12036, equation 17) on per-token averages, as TRL has it:
    ((c - c0)/n_c - (r - r0)/n_r - 1/(2 beta))^2. At policy = reference: (1/(2 beta))^2."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    completions: ClassVar[int] = 2

    def __call__(self, scored: Scored) -> Tensor:
        chosen = scored.chosen_logratio / scored.chosen_tokens
        rejected = scored.rejected_logratio / scored.rejected_tokens
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class IpoSum:
    """IPO on sums, the form of the TR papers (arXiv:2404.09656): ((c - c0) - (r - r0) - 1/(2 beta))^2.
    Its beta does not carry over to `Ipo`."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    completions: ClassVar[int] = 2

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.chosen_logratio - scored.rejected_logratio - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Sft:
    """Negative log-likelihood: averaged over rows this is minus the mean log-prob of all chosen tokens of the
    optimizer step (long answers weigh more), as TRL's `sft`. Reads chosen completions only, and no reference."""

    beta: float = 0.1  # unread; kept so that every loss has one
    needs_reference: ClassVar[bool] = False
    completions: ClassVar[int] = 1

    def __call__(self, scored: Scored) -> Tensor:
        return -scored.chosen / scored.mean_chosen_tokens


LOSSES: dict[str, type[Loss]] = {"sigmoid": Sigmoid, "ipo": Ipo, "ipo_sum": IpoSum, "sft": Sft}


def group_loss(
    loss: Loss,
    tokens: Tensor,  # (N,)
    weights: Tensor,  # (G,)
    mean_chosen_tokens: float = 1.0,
) -> Callable[[Tensor, Tensor | None, slice], Tensor]:
    """`loss` in the form that `fasttr_kernels.linear_preference_loss` calls: (logp, ref_logp, groups) -> the weighted
    sum of the losses of those groups, when every group is one row of `loss.completions` completions."""
    m = loss.completions

    def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        counts = tokens[groups.start * m : groups.stop * m]
        per_row = loss(Scored(logp, ref_logp, counts, m, mean_chosen_tokens))
        return (weights[groups] * per_row).sum()

    return loss_fn
