"""Losses of pairs. Names mean TRL's formulas, with the exceptions that say so.

c, r: summed log-probs of chosen and rejected under the policy, c0, r0 under the reference;
u = c - c0, v = r - r0; n_c, n_r: token counts; s the logistic function; e label smoothing; f the
divergence (reverse KL: f(x) = x); h = beta (f(u) - f(v)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.losses.base import BaseLoss, LossInputs

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def log_s(x: Tensor) -> Tensor:
    return F.logsigmoid(x)


@dataclass(frozen=True)
class DivergenceLoss(BaseLoss):
    """A loss of f(u) and f(v) (arXiv:2309.16240): reverse_kl x, forward_kl 1 - exp(-x),
    js_divergence log 2 + log s(x), alpha_divergence (exp((a - 1) x) - 1)/(a - 1) with the exponent
    clamped at 80, x at a = 1."""

    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    def f(self, x: Tensor) -> Tensor:
        a = self.f_alpha_divergence_coef
        if self.f_divergence_type == "forward_kl":
            return 1 - torch.exp(-x)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + log_s(x)
        if self.f_divergence_type == "alpha_divergence" and a != 1:
            return torch.expm1(((a - 1) * x).clamp(max=80)) / (a - 1)
        return x

    def f_of_sides(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """f(u) and f(v)."""
        return self.f(inputs.chosen_logratio), self.f(inputs.rejected_logratio)

    def h(self, inputs: LossInputs) -> Tensor:
        f_u, f_v = self.f_of_sides(inputs)
        return self.beta * (f_u - f_v)

    def f_margin_per_token(self, inputs: LossInputs) -> Tensor:
        """f(u)/n_c - f(v)/n_r."""
        f_u, f_v = self.f_of_sides(inputs)
        return f_u / inputs.chosen_tokens - f_v / inputs.rejected_tokens


@dataclass(frozen=True)
class Sigmoid(DivergenceLoss):
    """DPO (arXiv:2305.18290, equation 7): -log s(h), without smoothing. At policy = reference:
    log 2."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        return -log_s(self.h(inputs))


@dataclass(frozen=True)
class SigmoidNorm(DivergenceLoss):
    """Length-normalised DPO: -log s(beta (f(u)/n_c - f(v)/n_r))."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        return -log_s(self.beta * self.f_margin_per_token(inputs))


@dataclass(frozen=True)
class Cdpo(DivergenceLoss):
    """Conservative DPO (arXiv:2305.18290, appendix): -(1 - e) log s(h) - e log s(-h). fasttr's
    name."""

    label_smoothing: float = 0.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        h, e = self.h(inputs), self.label_smoothing
        return -(1 - e) * log_s(h) - e * log_s(-h)


@dataclass(frozen=True)
class Robust(DivergenceLoss):
    """Robust DPO (arXiv:2403.00409): [-(1 - e) log s(h) + e log s(-h)] / (1 - 2e), e below 1/2."""

    label_smoothing: float = 0.0

    def __call__(self, inputs: LossInputs) -> Tensor:
        h, e = self.h(inputs), self.label_smoothing
        return (-(1 - e) * log_s(h) + e * log_s(-h)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge(DivergenceLoss):
    """SLiC (arXiv:2305.10425): max(0, 1 - h)."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        return F.relu(1 - self.h(inputs))


@dataclass(frozen=True)
class Ipo(DivergenceLoss):
    """IPO (arXiv:2310.12036, equation 17) on per-token averages: (f(u)/n_c - f(v)/n_r -
    1/(2 beta))^2. At policy = reference: (1/(2 beta))^2."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        return (self.f_margin_per_token(inputs) - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class IpoSum(BaseLoss):
    """IPO on sums, the form of the TR papers (arXiv:2404.09656): (u - v - 1/(2 beta))^2. fasttr's
    name; its beta does not carry over to `ipo`."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = inputs.chosen_logratio, inputs.rejected_logratio
        return (u - v - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class ExoPair(DivergenceLoss):
    """EXO (arXiv:2402.00856, equation 16): s(h)(log s(h) - log(1 - e)) + s(-h)(log s(-h) - log e),
    e above 0."""

    label_smoothing: float = 1e-3

    def __call__(self, inputs: LossInputs) -> Tensor:
        h, e = self.h(inputs), self.label_smoothing
        chosen = h.sigmoid() * (log_s(h) - math.log1p(-e))
        rejected = (-h).sigmoid() * (log_s(-h) - math.log(e))
        return chosen + rejected


@dataclass(frozen=True)
class NcaPair(BaseLoss):
    """NCA (arXiv:2402.05369): -log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v)."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = self.beta * inputs.chosen_logratio, self.beta * inputs.rejected_logratio
        return -log_s(u) - 0.5 * log_s(-u) - 0.5 * log_s(-v)


@dataclass(frozen=True)
class BcoPair(BaseLoss):
    """BCO (arXiv:2404.04656) without the running mean: -log s(beta u) - log s(-beta v)."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = self.beta * inputs.chosen_logratio, self.beta * inputs.rejected_logratio
        return -log_s(u) - log_s(-v)


@dataclass(frozen=True)
class SppoHard(BaseLoss):
    """SPPO (arXiv:2405.00675), hard labels: (u - 1/(2 beta))^2 + (v + 1/(2 beta))^2."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = inputs.chosen_logratio, inputs.rejected_logratio
        return (u - 0.5 / self.beta) ** 2 + (v + 0.5 / self.beta) ** 2


@dataclass(frozen=True)
class ApoZero(BaseLoss):
    """APO-zero (arXiv:2408.06266): 1 - s(beta u) + s(beta v). At policy = reference: 1."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = self.beta * inputs.chosen_logratio, self.beta * inputs.rejected_logratio
        return 1 - u.sigmoid() + v.sigmoid()


@dataclass(frozen=True)
class ApoDown(BaseLoss):
    """APO-down (arXiv:2408.06266): s(beta u) + 1 - s(beta (u - v))."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = inputs.chosen_logratio, inputs.rejected_logratio
        return (self.beta * u).sigmoid() + 1 - (self.beta * (u - v)).sigmoid()


@dataclass(frozen=True)
class Discopop(DivergenceLoss):
    """DiscoPOP (arXiv:2406.08414): with t = s(h/tau), (1 - t)(-log s(h)) + t exp(-h)."""

    discopop_tau: float = 0.05

    def __call__(self, inputs: LossInputs) -> Tensor:
        h = self.h(inputs)
        t = (h / self.discopop_tau).sigmoid()
        return -(1 - t) * log_s(h) + t * torch.exp(-h)


@dataclass(frozen=True)
class Simpo(BaseLoss):
    """SimPO (arXiv:2405.14734, equation 6), without a reference:
    -log s(beta c/n_c - beta r/n_r - gamma)."""

    simpo_gamma: float = 0.5
    needs_reference: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        chosen = inputs.chosen_logp / inputs.chosen_tokens
        rejected = inputs.rejected_logp / inputs.rejected_tokens
        return -log_s(self.beta * (chosen - rejected) - self.simpo_gamma)


@dataclass(frozen=True)
class Orpo(BaseLoss):
    """ORPO (arXiv:2403.07691), without a reference: -c/n_c - beta log s(o(c/n_c) - o(r/n_r)) with
    the log odds o(x) = x - log(1 - exp(x)). The likelihood term is over the completion; TRL's older
    one covered the prompt."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        chosen = inputs.chosen_logp / inputs.chosen_tokens
        rejected = inputs.rejected_logp / inputs.rejected_tokens
        return -chosen - self.beta * log_s(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean_logp: Tensor) -> Tensor:
    # A completion of certain tokens has log-prob 0 and infinite odds: kept finite at fp32's
    # resolution.
    x = mean_logp.clamp(max=-1e-6)
    return x - torch.log(-torch.expm1(x))


@dataclass(frozen=True)
class Sft(BaseLoss):
    """Negative log-likelihood: averaged over rows this is minus the mean log-prob of all chosen
    tokens of a group (the optimizer step, unless `group_size` is given), as TRL's `sft`. Alone it
    reads chosen completions only."""

    needs_reference: ClassVar[bool] = False
    completions: ClassVar[int] = 1
    averages_tokens: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        return -inputs.whole_chosen_logp / inputs.chosen_tokens_mean
