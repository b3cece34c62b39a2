"""Losses whose rows depend on each other: they see one group of rows at a time (`group_size`).

u, v and s as in `fasttr.losses.pairs`; x = log-prob of a completion under the policy minus that
under the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.losses.base import Loss, Scored


def kl_estimate(scored: Scored) -> Tensor:
    """z of KTO, (): max(0, mean of x over the group's mismatched completions), without gradient."""
    return scored.v.detach().mean().clamp(min=0)


@dataclass(frozen=True)
class Kto(Loss):
    """KTO (arXiv:2402.01306): desirable w_d (1 - s(beta (x - z))), undesirable w_u (1 - s(beta (z -
    x))). At policy = reference: half the mean class weight."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    unpaired: ClassVar[bool] = True
    coupled: ClassVar[bool] = True

    def __call__(self, scored: Scored) -> Tensor:
        x = self.beta * (scored.u - kl_estimate(scored))
        good, bad = 1 - x.sigmoid(), 1 - (-x).sigmoid()
        return torch.where(
            _labels(scored), self.desirable_weight * good, self.undesirable_weight * bad
        )


@dataclass(frozen=True)
class ApoZeroUnpaired(Loss):
    """APO-zero for unpaired rows (arXiv:2408.06266): desirable w_d (1 - s(beta x)), undesirable w_u
    s(beta x)."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    unpaired: ClassVar[bool] = True
    completions: ClassVar[int] = 1

    def __call__(self, scored: Scored) -> Tensor:
        x = (self.beta * scored.u).sigmoid()
        return torch.where(
            _labels(scored), self.desirable_weight * (1 - x), self.undesirable_weight * x
        )


@dataclass(frozen=True)
class KtoPaired(Loss):
    """KTO on pairs as the TR papers' code has it (arXiv:2404.09656): a pair's mean of 1 - s(beta (u
    - K_v)) and 1 - s(beta (K_u - v)), K_w = max(0, group mean of w), with its gradient. fasttr's
    name."""

    coupled: ClassVar[bool] = True

    def __call__(self, scored: Scored) -> Tensor:
        u, v = scored.u, scored.v
        k_u, k_v = u.mean().clamp(min=0), v.mean().clamp(min=0)
        return 1 - 0.5 * ((self.beta * (u - k_v)).sigmoid() + (self.beta * (k_u - v)).sigmoid())


@dataclass(frozen=True)
class Aot(Loss):
    """AOT (arXiv:2406.05882) on pairs: with d the difference of the sorted c - r and the sorted c0
    - r0 of a group, -(1 - e) log s(beta d) - e log s(-beta d)."""

    label_smoothing: float = 0.0
    coupled: ClassVar[bool] = True

    def __call__(self, scored: Scored) -> Tensor:
        policy = scored.chosen - scored.rejected
        return self.smoothed(policy.sort().values - scored.ref_margin.sort().values)

    def smoothed(self, d: Tensor) -> Tensor:
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(self.beta * d) - e * F.logsigmoid(-self.beta * d)


@dataclass(frozen=True)
class AotUnpaired(Aot):
    """AOT with d the difference of the sorted u and the sorted v of a group (arXiv:2406.05882)."""

    def __call__(self, scored: Scored) -> Tensor:
        return self.smoothed(scored.u.sort().values - scored.v.sort().values)


def _labels(scored: Scored) -> Tensor:
    if scored.labels is None:
        raise ValueError("got no labels; wanted desirable or not for every row of this loss")
    return scored.labels
