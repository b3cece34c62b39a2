"""Losses of pairs. Names mean TRL's formulas, with the exceptions that say so.

c, r: summed log-probs of chosen and rejected under the policy, c0, r0 under the reference; u = c -
c0, v = r - r0;
n_c, n_r: token counts; s the logistic function; e label smoothing; f the divergence (reverse KL:
f(x) = x); h = beta (f(u) - f(v)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.losses.base import Loss, Scored

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def log_s(x: Tensor) -> Tensor:
    return F.logsigmoid(x)


@dataclass(frozen=True)
class DivergenceLoss(Loss):
    """A loss of f(u) and f(v) (arXiv:2309.16240): reverse_kl x, forward_kl 1 - exp(-x),
    js_divergence log 2 + log s(x), alpha_divergence (exp((a - 1) x) - 1)/(a - 1) with the exponent
    clamped at 80, x at a = 1."""

    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    def f(self, x: Tensor) -> Tensor:
        kind, a = self.f_divergence_type, self.f_alpha_divergence_coef
        if kind == "reverse_kl" or (kind == "alpha_divergence" and a == 1):
            return x
        if kind == "forward_kl":
            return 1 - torch.exp(-x)
        if kind == "js_divergence":
            return math.log(2) + log_s(x)
        return torch.expm1(((a - 1) * x).clamp(max=80)) / (a - 1)

    def h(self, scored: Scored) -> Tensor:
        return self.beta * (self.f(scored.u) - self.f(scored.v))


@dataclass(frozen=True)
class Sigmoid(DivergenceLoss):
    """DPO (arXiv:2305.18290, equation 7): -log s(h), without smoothing. At policy = reference: log
    2."""

    def __call__(self, scored: Scored) -> Tensor:
        return -log_s(self.h(scored))


@dataclass(frozen=True)
class SigmoidNorm(DivergenceLoss):
    """Length-normalised DPO: -log s(beta (f(u)/n_c - f(v)/n_r))."""

    def __call__(self, scored: Scored) -> Tensor:
        return -log_s(self.beta * (self.f(scored.u) / scored.n_c - self.f(scored.v) / scored.n_r))


@dataclass(frozen=True)
class Cdpo(DivergenceLoss):
    """Conservative DPO (arXiv:2305.18290, appendix): -(1 - e) log s(h) - e log s(-h). fasttr's
    name."""

    label_smoothing: float = 0.0

    def __call__(self, scored: Scored) -> Tensor:
        h, e = self.h(scored), self.label_smoothing
        return -(1 - e) * log_s(h) - e * log_s(-h)


@dataclass(frozen=True)
class Robust(DivergenceLoss):
    """Robust DPO (arXiv:2403.00409): [-(1 - e) log s(h) + e log s(-h)] / (1 - 2e), e below 1/2."""

    label_smoothing: float = 0.0

    def __call__(self, scored: Scored) -> Tensor:
        h, e = self.h(scored), self.label_smoothing
        return (-(1 - e) * log_s(h) + e * log_s(-h)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge(DivergenceLoss):
    """SLiC (arXiv:2305.10425): max(0, 1 - h)."""

    def __call__(self, scored: Scored) -> Tensor:
        return F.relu(1 - self.h(scored))


@dataclass(frozen=True)
class Ipo(DivergenceLoss):
    """IPO (arXiv:2310.12036, equation 17) on per-token averages: (f(u)/n_c - f(v)/n_r - 1/(2
    beta))^2. At policy = reference: (1/(2 beta))^2."""

    def __call__(self, scored: Scored) -> Tensor:
        return (
            self.f(scored.u) / scored.n_c - self.f(scored.v) / scored.n_r - 1 / (2 * self.beta)
        ) ** 2


@dataclass(frozen=True)
class IpoSum(Loss):
    """IPO on sums, the form of the TR papers (arXiv:2404.09656): (u - v - 1/(2 beta))^2. fasttr's
    name; its beta does not carry over to `ipo`."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.u - scored.v - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class ExoPair(DivergenceLoss):
    """EXO (arXiv:2402.00856, equation 16): s(h)(log s(h) - log(1 - e)) + s(-h)(log s(-h) - log e),
    e above 0."""

    label_smoothing: float = 1e-3

    def __call__(self, scored: Scored) -> Tensor:
        h, e = self.h(scored), self.label_smoothing
        return h.sigmoid() * (log_s(h) - math.log1p(-e)) + (-h).sigmoid() * (
            log_s(-h) - math.log(e)
        )


@dataclass(frozen=True)
class NcaPair(Loss):
    """NCA (arXiv:2402.05369): -log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v)."""

    def __call__(self, scored: Scored) -> Tensor:
        u, v = self.beta * scored.u, self.beta * scored.v
        return -log_s(u) - 0.5 * log_s(-u) - 0.5 * log_s(-v)


@dataclass(frozen=True)
class BcoPair(Loss):
    """BCO (arXiv:2404.04656) without the running mean: -log s(beta u) - log s(-beta v)."""

    def __call__(self, scored: Scored) -> Tensor:
        return -log_s(self.beta * scored.u) - log_s(-self.beta * scored.v)


@dataclass(frozen=True)
class SppoHard(Loss):
    """SPPO (arXiv:2405.00675), hard labels: (u - 1/(2 beta))^2 + (v + 1/(2 beta))^2."""

    def __call__(self, scored: Scored) -> Tensor:
        return (scored.u - 0.5 / self.beta) ** 2 + (scored.v + 0.5 / self.beta) ** 2


@dataclass(frozen=True)
class ApoZero(Loss):
    """APO-zero (arXiv:2408.06266): 1 - s(beta u) + s(beta v). At policy = reference: 1."""

    def __call__(self, scored: Scored) -> Tensor:
        return 1 - (self.beta * scored.u).sigmoid() + (self.beta * scored.v).sigmoid()


@dataclass(frozen=True)
class ApoDown(Loss):
    """APO-down (arXiv:2408.06266): s(beta u) + 1 - s(beta (u - v))."""

    def __call__(self, scored: Scored) -> Tensor:
        return (self.beta * scored.u).sigmoid() + 1 - (self.beta * (scored.u - scored.v)).sigmoid()


@dataclass(frozen=True)
class Discopop(DivergenceLoss):
    """DiscoPOP (arXiv:2406.08414): with t = s(h/tau), (1 - t)(-log s(h)) + t exp(-h)."""

    discopop_tau: float = 0.05

    def __call__(self, scored: Scored) -> Tensor:
        h = self.h(scored)
        t = (h / self.discopop_tau).sigmoid()
        return -(1 - t) * log_s(h) + t * torch.exp(-h)


@dataclass(frozen=True)
class Simpo(Loss):
    """SimPO (arXiv:2405.14734, equation 6), without a reference: -log s(beta c/n_c - beta r/n_r -
    gamma)."""

    simpo_gamma: float = 0.5
    needs_reference: ClassVar[bool] = False

    def __call__(self, scored: Scored) -> Tensor:
        return -log_s(
            self.beta * (scored.chosen / scored.n_c - scored.rejected / scored.n_r)
            - self.simpo_gamma
        )


@dataclass(frozen=True)
class Orpo(Loss):
    """ORPO (arXiv:2403.07691), without a reference: -c/n_c - beta log s(o(c/n_c) - o(r/n_r)) with
    the log odds o(x) = x - log(1 - exp(x)). The likelihood term is over the completion; TRL's older
    one covered the prompt."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, scored: Scored) -> Tensor:
        # A completion of certain tokens has log-prob 0 and infinite odds: kept finite at fp32's
        # resolution.
        chosen = (scored.chosen / scored.n_c).clamp(max=-1e-6)
        rejected = (scored.rejected / scored.n_r).clamp(max=-1e-6)
        odds = (
            chosen - torch.log(-torch.expm1(chosen)) - rejected + torch.log(-torch.expm1(rejected))
        )
        return -scored.chosen / scored.n_c - self.beta * log_s(odds)


@dataclass(frozen=True)
class Sft(Loss):
    """Negative log-likelihood: averaged over rows this is minus the mean log-prob of all chosen
    tokens of a group (the optimizer step, unless `group_size` is given), as TRL's `sft`. Alone it
    reads chosen completions only."""

    needs_reference: ClassVar[bool] = False
    completions: ClassVar[int] = 1

    def __call__(self, scored: Scored) -> Tensor:
        return -scored.chosen / scored.chosen_tokens_mean
