"""Losses of unpaired rows, and losses whose rows depend on each other.

The latter see one group of rows at a time (`group_size`). u, v and s as in `fasttr.losses.pairs`;
x = log-prob of a row's own completion under the policy minus that under the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.losses.base import BaseLoss, LossInputs


def kl_estimate(inputs: LossInputs) -> Tensor:
    """z of KTO, (): max(0, mean of x over the group's mismatched completions), without gradient."""
    return inputs.rejected_logratio.detach().mean().clamp(min=0)


@dataclass(frozen=True)
class Kto(BaseLoss):
    """KTO (arXiv:2402.01306): desirable w_d (1 - s(beta (x - z))), undesirable
    w_u (1 - s(beta (z - x))). At policy = reference: half the mean class weight."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    unpaired: ClassVar[bool] = True
    coupled: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        h = self.beta * (inputs.chosen_logratio - kl_estimate(inputs))
        desirable = self.desirable_weight * (1 - h.sigmoid())
        undesirable = self.undesirable_weight * (1 - (-h).sigmoid())
        return torch.where(_labels(inputs), desirable, undesirable)


@dataclass(frozen=True)
class ApoZeroUnpaired(BaseLoss):
    """APO-zero for unpaired rows (arXiv:2408.06266): desirable w_d (1 - s(beta x)), undesirable
    w_u s(beta x)."""

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    unpaired: ClassVar[bool] = True
    completions: ClassVar[int] = 1

    def __call__(self, inputs: LossInputs) -> Tensor:
        share = (self.beta * inputs.chosen_logratio).sigmoid()
        desirable = self.desirable_weight * (1 - share)
        undesirable = self.undesirable_weight * share
        return torch.where(_labels(inputs), desirable, undesirable)


@dataclass(frozen=True)
class KtoPaired(BaseLoss):
    """KTO on pairs as the TR papers' code has it (arXiv:2404.09656): a pair's mean of
    1 - s(beta (u - K_v)) and 1 - s(beta (K_u - v)), K_w = max(0, group mean of w), with its
    gradient. fasttr's name."""

    coupled: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = inputs.chosen_logratio, inputs.rejected_logratio
        k_u = u.mean().clamp(min=0)
        k_v = v.mean().clamp(min=0)
        kept = (self.beta * (u - k_v)).sigmoid() + (self.beta * (k_u - v)).sigmoid()
        return 1 - 0.5 * kept


@dataclass(frozen=True)
class Aot(BaseLoss):
    """AOT (arXiv:2406.05882) on pairs: with d the difference of the sorted c - r and the sorted
    c0 - r0 of a group, -(1 - e) log s(beta d) - e log s(-beta d)."""

    label_smoothing: float = 0.0
    coupled: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs) -> Tensor:
        margin = inputs.chosen_logp - inputs.rejected_logp
        return self.smoothed(margin.sort().values - inputs.ref_margin.sort().values)

    def smoothed(self, d: Tensor) -> Tensor:
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(self.beta * d) - e * F.logsigmoid(-self.beta * d)


@dataclass(frozen=True)
class AotUnpaired(Aot):
    """AOT with d the difference of the sorted u and the sorted v of a group (arXiv:2406.05882)."""

    def __call__(self, inputs: LossInputs) -> Tensor:
        u, v = inputs.chosen_logratio, inputs.rejected_logratio
        return self.smoothed(u.sort().values - v.sort().values)


def _labels(inputs: LossInputs) -> Tensor:
    if inputs.labels is None:
        raise ValueError("got no labels; wanted desirable or not for every row of this loss")
    return inputs.labels
