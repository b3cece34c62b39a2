"""A loss on the groups of a pack: which rows are computed together, and what weighs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttr.data.in_memory import ListTrees
from fasttr.losses import CustomLoss, Kto, LossInputs, Objective, Sft, Sigmoid, group_loss
from fasttr.packing.layout import pack
from tests.losses.equations import ABOVE, BETA, DESIRABLE, EQUATIONS, UNDESIRABLE, Point
from tests.tiny import random_trees

WEIGHTS = np.array([0.5, 2.0, 1.5, 3.0])


def rows_of(point: Point, rows: slice) -> Point:
    """Some rows of a point, as a group of their own."""
    arrays = {name: getattr(point, name)[rows] for name in point._fields if name != "divergence"}
    return point._replace(**arrays)


def interleaved(chosen: np.ndarray, rejected: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([chosen, rejected], axis=1).reshape(-1))


LOGP = interleaved(ABOVE.c, ABOVE.r)
REF_LOGP = interleaved(ABOVE.c0, ABOVE.r0)
COUNTS = interleaved(ABOVE.n_c, ABOVE.n_r)


def test_a_coupled_loss_sees_one_group_at_a_time():
    """Groups of three rows and of one, the second asked for alone: its log-probs begin at it."""
    loss_fn = group_loss(
        Kto(BETA, DESIRABLE, UNDESIRABLE),
        COUNTS,
        torch.from_numpy(WEIGHTS),
        cu_rows=[0, 3, 4],
        labels=torch.from_numpy(ABOVE.is_desirable),
    )
    first, second = (
        (WEIGHTS[rows] * EQUATIONS["kto"](rows_of(ABOVE, rows))).sum()
        for rows in (slice(0, 3), slice(3, 4))
    )
    whole = (WEIGHTS * EQUATIONS["kto"](ABOVE)).sum()
    assert abs(first + second - whole) > 0.01
    assert loss_fn(LOGP, REF_LOGP, slice(0, 2)).item() == pytest.approx(first + second)
    assert loss_fn(LOGP[6:], REF_LOGP[6:], slice(1, 2)).item() == pytest.approx(second)


def test_a_loss_of_rows_gets_those_of_its_groups_and_everything_that_came_with_them():
    seen = []

    def note(inputs: LossInputs) -> torch.Tensor:
        seen.append(inputs)
        return inputs.chosen_logp

    loss_fn = group_loss(
        CustomLoss(note),
        COUNTS,
        torch.from_numpy(WEIGHTS),
        labels=torch.from_numpy(ABOVE.is_desirable),
        chosen_tokens_mean=torch.from_numpy(ABOVE.mean_n_c),
        per_completion={"margin": torch.arange(8.0)},
    )
    summed = loss_fn(LOGP[2:6], REF_LOGP[2:6], slice(1, 3), whole_logp=LOGP[2:6] - 1)
    assert summed.item() == pytest.approx((WEIGHTS * ABOVE.c)[1:3].sum())
    (inputs,) = seen
    assert inputs.logp.tolist() == LOGP[2:6].tolist()
    assert inputs.ref_logp.tolist() == REF_LOGP[2:6].tolist()
    assert inputs.token_counts.tolist() == COUNTS[2:6].tolist()
    assert inputs.labels.tolist() == [False, False]
    assert inputs.chosen_tokens_mean.tolist() == [4.0, 2.5]
    assert inputs.whole_logp.tolist() == (LOGP[2:6] - 1).tolist()
    assert inputs.per_completion["margin"].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_a_step_divides_by_its_rows_and_sft_by_the_tokens_that_are_predicted():
    """Chosen tokens are 4, 1, 6 and 2; without a prompt the first one is not predicted."""
    trees = ListTrees(random_trees([(3, 4, 2), (2, 1, 5), (0, 6, 1), (1, 2, 2)]))
    rows = np.array([3, 2, 0, 1])
    step = Objective(Sft()).of_rows(trees, rows)
    assert step.normalizer == 4
    assert step.chosen_tokens_means == dict.fromkeys([0, 1, 2, 3], (4 + 1 + 5 + 2) / 4)
    in_twos = Objective(Sft(), average_over=2).of_rows(trees, rows)
    assert in_twos.chosen_tokens_means == {3: 3.5, 2: 3.5, 0: 2.5, 1: 2.5}
    in_threes = Objective(Sft(), average_over=3).of_rows(trees, rows)
    assert in_threes.chosen_tokens_means == {3: 11 / 3, 0: 11 / 3, 2: 11 / 3, 1: 1.0}
    assert Objective(Sigmoid()).of_rows(trees, rows).chosen_tokens_means is None


def test_a_pack_is_given_the_means_of_its_rows_and_the_weights_of_its_trees():
    shapes = [(3, 4), (2, 1), (2, 5)]
    trees = [tree._replace(weight=0.5 + tree.row) for tree in random_trees(shapes)]
    step = Objective(Sft(), average_over=2).of_rows(ListTrees(trees), np.array([0, 1, 2]))
    loss_fn = step.loss_fn(pack([trees[2], trees[0]]))
    got = loss_fn(torch.tensor([-10.0, -8.0]), None, slice(0, 2))
    assert got.item() == pytest.approx(2.5 * 10 / 5 + 0.5 * 8 / 2.5)
