"""Losses of reward models: numbers of a row from the scores of its completions, with torch alone.

Legend: B rows, m completions of a row, n = m B completions; s the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.batch import PackedBatch, TreeSource

MARGIN = "margin"  # its name among the numbers that come with a completion


class RewardInputs(NamedTuple):
    """Rows with the scores of their m completions, best first, row after row."""

    score: Tensor  # (n,)
    completions: int = 2  # m
    margin: Tensor | None = None  # (B,) by how much the first is known to be better

    @property
    def score_Bm(self) -> Tensor:
        return self.score.view(-1, self.completions)


@dataclass(frozen=True)
class RewardLoss:
    """What losses of scores have in common; what a loop asks of any loss."""

    completions: int = 2
    center_rewards_coefficient: float | None = None
    beta: ClassVar[float] = 1.0
    needs_reference: ClassVar[bool] = False
    unpaired: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    averages_tokens: ClassVar[bool] = False

    def __call__(self, inputs: RewardInputs) -> Tensor:
        """(B,)"""
        loss = self.of_ranks(inputs)
        if self.center_rewards_coefficient is not None:
            loss = loss + self.center_rewards_coefficient * inputs.score_Bm.sum(dim=1) ** 2
        return loss

    def of_ranks(self, inputs: RewardInputs) -> Tensor:
        raise TypeError(f"{type(self).__name__} is a base of losses; wanted one of them")


class BradleyTerry(RewardLoss):
    """-log s(r_c - r_r - margin) + center (r_c + r_r)^2 (arXiv:2203.02155; margin: 2307.09288;
    center: 2312.09244)."""

    def of_ranks(self, inputs: RewardInputs) -> Tensor:
        difference = inputs.score_Bm[:, 0] - inputs.score_Bm[:, 1]
        if inputs.margin is not None:
            difference = difference - inputs.margin
        return -F.logsigmoid(difference)


class PlackettLuce(RewardLoss):
    """-sum_i (r_i - log sum_{j >= i} exp r_j) over the ranks i, best first (Plackett 1975): with
    two completions Bradley-Terry."""

    def of_ranks(self, inputs: RewardInputs) -> Tensor:
        score_Bm = inputs.score_Bm
        rest_Bm = score_Bm.flip(1).logcumsumexp(dim=1).flip(1)
        return (rest_Bm - score_Bm).sum(dim=1)


def reward_loss(completions: int, center_rewards_coefficient: float | None = None) -> RewardLoss:
    """The loss of rows with so many ranked completions."""
    kind = BradleyTerry if completions == 2 else PlackettLuce
    return kind(completions, center_rewards_coefficient)


# score (n,) -> (): the weighted sum of the losses of a pack's rows.
ScoreLossFn = Callable[[Tensor], Tensor]


class RewardStep(NamedTuple):
    """The loss of one optimizer step: the rows' weighted sum over their number."""

    loss: RewardLoss
    normalizer: int
    head_means: tuple[str, ...] = ()  # no vocabulary, no statistics of it

    def loss_fn(self, batch: PackedBatch) -> ScoreLossFn:
        """The loss of one pack, which is on the device, as a `RewardModel` calls it."""
        m = self.loss.completions
        margin = batch.per_completion.get(MARGIN)

        def loss_fn(score: Tensor) -> Tensor:
            margin_B = None if margin is None else margin[::m]
            return (batch.weights * self.loss(RewardInputs(score, m, margin_B))).sum()

        return loss_fn


@dataclass(frozen=True)
class RewardObjective:
    """A loss of scores as a run trains on it."""

    loss: RewardLoss

    def of_rows(self, trees: TreeSource, rows: np.ndarray) -> RewardStep:
        return RewardStep(self.loss, len(rows))


@torch.no_grad()
def accuracy(score_Bm: Tensor) -> Tensor:
    """(B,) share of a row's pairs of ranks in whose order the scores stand; a tie counts as
    wrong."""
    m = score_Bm.shape[1]
    better, worse = torch.triu_indices(m, m, offset=1, device=score_Bm.device)
    return (score_Bm[:, better] > score_Bm[:, worse]).to(score_Bm.dtype).mean(dim=1)
