"""The plan and the layout: every row once, TRL's order, budgets, and the inverse of the gathers."""

import numpy as np
import pytest
import torch

from fasttr.data.in_memory import ListTrees
from fasttr.models.gather import gather_rows
from fasttr.packing.layout import first_fit_decreasing, pack
from fasttr.packing.plan import Plan
from tests.tiny import random_trees


def source(n=23, seed=0):
    rng = np.random.default_rng(seed)
    return ListTrees(random_trees([tuple(rng.integers(1, 20, 3)) for _ in range(n)]))


def test_bins_hold_every_item_once_within_the_budget():
    sizes = np.random.default_rng(0).integers(1, 50, 200).tolist()
    bins = first_fit_decreasing(sizes, 64)
    assert sorted(i for b in bins for i in b) == list(range(200))
    assert all(sum(sizes[i] for i in b) <= 64 for b in bins)
    assert len(bins) <= 1.23 * sum(sizes) / 64 + 1
    assert first_fit_decreasing([70, 10], 64) == [[0], [1]]  # over the budget: a bin of its own


def test_the_order_is_a_permutation_seeded_by_seed_plus_epoch():
    """What TRL's sampler draws, so that a step holds the same rows."""
    plan = Plan(
        source(), train_batch_size=4, num_train_epochs=2.0, seed=7, max_tokens_per_batch=100
    )
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 12)
    for epoch in range(2):
        rows = np.concatenate([plan.rows(epoch * 6 + k) for k in range(6)])
        expected = torch.randperm(23, generator=torch.Generator().manual_seed(7 + epoch))
        assert rows.tolist() == expected.tolist()
    assert len(plan.rows(5)) == 3  # the epoch's remainder


def test_windows_cover_the_steps_once_and_resume_inside_one():
    plan = Plan(source(), train_batch_size=4, max_steps=10, max_tokens_per_batch=100)
    assert list(plan.windows(4)) == [range(0, 4), range(4, 8), range(8, 10)]
    assert list(plan.windows(4, start=5)) == [range(4, 8), range(8, 10)]
    assert list(plan.windows(None, start=3)) == [range(0, 10)]


def test_packs_of_a_step_hold_its_rows_and_nothing_else():
    plan = Plan(source(), train_batch_size=8, max_tokens_per_batch=60)
    for step in range(plan.total_steps):
        packs = plan.packs(step)
        assert sorted(r for b in packs for r in b.rows) == sorted(plan.rows(step).tolist())
        assert all(len(b.input_ids) <= 60 for b in packs)


def test_layout_of_a_pack_by_hand():
    trees = random_trees([(2, 3, 1), (0, 2)])
    p, c1, c2 = trees[0].prompt_ids, *trees[0].completions
    d = trees[1].completions[0]
    batch = pack(trees)
    assert batch.input_ids.tolist() == [*p, *c1, *c2, *d]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert batch.attention.lengths() == ([5, 1, 2], [5, 3, 2])
    assert batch.attention.keys.sources.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    # The prompt's last row predicts the first token of both completions; without a prompt nothing
    # does.
    assert batch.predicting.sources.tolist() == [1, 2, 3, 1, 6]
    assert batch.target.tolist() == [*c1, *c2, d[1]]
    assert batch.cu_completions.tolist() == [0, 3, 4, 5]
    assert batch.cu_groups.tolist() == [0, 2, 3]
    assert batch.token_counts.tolist() == [3, 1, 2]
    assert batch.num_tokens == 5 + 3 + 2


def test_the_gather_is_the_identity_without_shared_prompts():
    assert pack(random_trees([(2, 3), (4, 1)])).attention.keys.sources.tolist() == list(range(10))


def test_readers_of_a_gather_by_hand():
    keys = pack(random_trees([(2, 1, 1)])).attention.keys
    assert keys.sources.tolist() == [0, 1, 2, 0, 1, 3]
    assert keys.offsets.tolist() == [0, 2, 4, 5, 6]
    assert keys.readers.tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("which", ["keys", "predicting"])
def test_the_backward_of_a_gather_is_the_sum_over_readers(which):
    batch = pack(random_trees([(3, 2, 4, 1), (1, 2), (5, 1, 1)]))
    gather = {"keys": batch.attention.keys, "predicting": batch.predicting}[which]
    x = torch.randn(len(batch.input_ids), 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(gather.sources), 2, 3, dtype=torch.float64)
    (got,) = torch.autograd.grad((gather_rows(x, gather) * weight).sum(), x)
    (want,) = torch.autograd.grad((x[gather.sources] * weight).sum(), x)
    torch.testing.assert_close(got, want)
    assert gather.offsets.diff().max() == 3
