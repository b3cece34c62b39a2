"""The plan: which rows make which step, in TRL's order, and where the reference moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttr.data.in_memory import ListTrees
from fasttr.packing.plan import Plan, pack_rows, tree_sizes
from tests.tiny import random_trees


@pytest.fixture(scope="module")
def trees() -> ListTrees:
    """23 rows of unequal lengths."""
    rng = np.random.default_rng(0)
    return ListTrees(random_trees([tuple(rng.integers(1, 20, 3)) for _ in range(23)]))


def test_the_order_is_a_permutation_seeded_by_seed_plus_epoch(trees):
    """What TRL's sampler draws, so that a step holds the same rows."""
    plan = Plan(trees, train_batch_size=4, num_train_epochs=2.0, seed=7, max_tokens_per_batch=100)
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 12)
    for epoch in range(2):
        rows = np.concatenate([plan.rows(epoch * 6 + step) for step in range(6)])
        generator = torch.Generator().manual_seed(7 + epoch)
        assert rows.tolist() == torch.randperm(23, generator=generator).tolist()
    assert len(plan.rows(5)) == 3  # the epoch's remainder


def test_epochs_may_be_fractions_and_max_steps_wins(trees):
    common = {"train_batch_size": 4, "max_tokens_per_batch": 100}
    assert Plan(trees, **common, num_train_epochs=0.4).total_steps == 3  # ceil(2.4)
    assert Plan(trees, **common, num_train_epochs=2.0, max_steps=5).total_steps == 5


def test_the_last_rows_are_dropped_when_they_do_not_fill_a_batch(trees):
    common = {"train_batch_size": 8, "max_tokens_per_batch": 100, "shuffle": False}
    plan = Plan(trees, **common, multiple_of=4)  # 20 rows
    assert plan.steps_per_epoch == 3
    found = [plan.rows(step).tolist() for step in range(4)]
    assert found == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9, 10, 11, 12, 13, 14, 15],
        [16, 17, 18, 19],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert Plan(trees, **common, multiple_of=8).steps_per_epoch == 2
    assert Plan(trees, **common).steps_per_epoch == 3


def test_windows_cover_the_steps_once_and_resume_inside_one(trees):
    plan = Plan(trees, train_batch_size=4, max_steps=10, max_tokens_per_batch=100)
    assert list(plan.windows(4)) == [range(0, 4), range(4, 8), range(8, 10)]
    assert list(plan.windows(4, start=5)) == [range(4, 8), range(8, 10)]
    assert list(plan.windows(4, start=8)) == [range(8, 10)]
    assert list(plan.windows(None, start=3)) == [range(0, 10)]
    assert list(plan.windows(20)) == [range(0, 10)]
    assert list(plan.windows(4, start=10)) == [range(8, 10)]


def test_packs_of_a_step_hold_its_rows_and_nothing_else(trees):
    plan = Plan(trees, train_batch_size=8, max_tokens_per_batch=60)
    for step in range(plan.total_steps):
        packs = plan.packs(step)
        rows = sorted(row for batch in packs for row in batch.rows)
        assert rows == sorted(plan.rows(step).tolist())
        assert all(len(batch.input_ids) <= 60 for batch in packs)


def test_a_group_of_rows_shares_a_pack_whatever_the_budget(trees):
    """Eight rows in groups of three: the last has two."""
    for budget, expected in ((1, 3), (160, 2), (10_000, 1)):
        packs = pack_rows(trees, np.arange(5, 13), budget, group_rows=3)
        groups = [
            batch.rows[first:last]
            for batch in packs
            for first, last in zip(batch.cu_rows[:-1], batch.cu_rows[1:], strict=True)
        ]
        assert sorted(groups) == [(5, 6, 7), (8, 9, 10), (11, 12)]
        assert len(packs) == expected


def test_tokens_of_rows_count_each_prompt_once(trees):
    plan = Plan(trees, train_batch_size=4, max_tokens_per_batch=100)
    rows = np.array([3, 17])
    expected = [
        len(trees[row].prompt_ids) + sum(map(len, trees[row].completions)) for row in (3, 17)
    ]
    assert tree_sizes(trees, rows).tolist() == expected
    assert plan.tokens(rows) == sum(expected)
    assert plan.tokens(rows) == sum(
        len(batch.input_ids) for batch in pack_rows(trees, rows, budget=1)
    )


def test_a_smaller_micro_batch_counts_as_much_as_a_full_one(trees):
    """23 rows, 8 a step in micro-batches of 3, 3 and 2; the last step has 3, 3 and 1."""
    common = {"train_batch_size": 8, "max_tokens_per_batch": 10_000, "shuffle": False}
    plan = Plan(trees, **common, micro_batch_size=3)
    assert plan.micro_batches(plan.rows(0)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    for step, members in ((0, (3, 3, 2)), (2, (3, 3, 1))):
        rows = plan.rows(step)
        (batch,) = plan.packs(step)
        weights = dict(zip(batch.rows, batch.weights.tolist(), strict=True))
        values = np.random.default_rng(1).normal(size=23)
        weighted = sum(weights[row] * values[row] for row in rows.tolist()) / len(rows)
        ends = np.cumsum(members)
        means = [
            values[rows[end - size : end]].mean() for size, end in zip(members, ends, strict=1)
        ]
        assert weighted == pytest.approx(np.mean(means), rel=1e-6)
    (batch,) = Plan(trees, **common).packs(2)
    assert batch.weights.tolist() == [1.0] * 7
