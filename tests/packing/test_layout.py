"""The layout of a pack: where tokens, keys and predicting rows lie, and the inverse of gathers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttr.models.gather import gather_rows
from fasttr.packing.layout import balanced_bins, first_fit_decreasing, pack
from tests.tiny import random_trees


def test_bins_hold_every_item_once_within_the_budget():
    sizes = np.random.default_rng(0).integers(1, 50, 200).tolist()
    bins = first_fit_decreasing(sizes, 64)
    assert sorted(item for members in bins for item in members) == list(range(200))
    assert all(sum(sizes[item] for item in members) <= 64 for members in bins)
    assert len(bins) <= 1.23 * sum(sizes) / 64 + 1


def test_bins_are_filled_by_size_to_the_brim_and_ordered_by_first_place():
    """7 and 3 fill one, 6 and 4 another; 2 is left over."""
    assert first_fit_decreasing([3, 2, 6, 7, 4], 10) == [[0, 3], [1], [2, 4]]
    assert first_fit_decreasing([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert first_fit_decreasing([10], 10) == [[0]]


def test_balanced_bins_are_as_few_and_never_fuller():
    """Greedy bins of these lengths hold 64 and a small rest."""
    saved = 0
    for seed in range(40):
        sizes = np.random.default_rng(seed).integers(3, 40, 23).tolist()
        fullest, bins = first_fit_decreasing(sizes, 64), balanced_bins(sizes, 64)
        assert sorted(item for members in bins for item in members) == list(range(23))
        assert len(bins) == len(fullest)
        loads, full_loads = (
            [sum(sizes[item] for item in members) for members in found] for found in (bins, fullest)
        )
        assert max(loads) <= max(full_loads) <= 64
        saved += min(loads) > min(full_loads)
    assert saved > 10


def test_balanced_bins_by_hand():
    assert balanced_bins([3, 2, 6, 7, 4], 30) == [[0, 1, 2, 3, 4]]
    assert first_fit_decreasing([5, 5, 5, 5, 5, 1], 20) == [[0, 1, 2, 3], [4, 5]]
    assert balanced_bins([5, 5, 5, 5, 5, 1], 20) == [[0, 2, 4], [1, 3, 5]]
    # An item over the budget is alone, and where even bins lack room the fullest ones stay.
    assert balanced_bins([50, 3, 4], 10) == [[0], [1, 2]]
    assert balanced_bins([6, 6, 4, 4, 4, 3, 3], 15) == first_fit_decreasing(
        [6, 6, 4, 4, 4, 3, 3], 15
    )


def test_an_item_over_the_budget_has_a_bin_of_its_own():
    assert first_fit_decreasing([70, 10, 54], 64) == [[0], [1, 2]]
    assert first_fit_decreasing([1, 2, 3], 0) == [[0], [1], [2]]


def test_layout_of_a_pack_by_hand():
    first, second = random_trees([(2, 3, 1), (0, 2)])
    prompt = first.prompt_ids
    c1, c2 = first.completions
    (d,) = second.completions
    batch = pack([first, second])
    assert batch.input_ids.tolist() == [*prompt, *c1, *c2, *d]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert batch.attention.lengths() == ([5, 1, 2], [5, 3, 2])
    assert batch.attention.cu_q.tolist() == [0, 5, 6, 8]
    assert batch.attention.cu_k.tolist() == [0, 5, 8, 10]
    assert batch.attention.cu_q.dtype == batch.attention.cu_k.dtype == torch.int32
    assert batch.attention.keys.sources.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    # The prompt's last row predicts the first token of both completions; without a prompt nothing
    # does.
    assert batch.predicting.sources.tolist() == [1, 2, 3, 1, 6]
    assert batch.target.tolist() == [*c1, *c2, d[1]]
    assert batch.cu_completions.tolist() == [0, 3, 4, 5]
    assert batch.cu_groups.tolist() == [0, 2, 3]
    assert batch.token_counts.tolist() == [3, 1, 2]


def test_each_completion_is_parted_at_the_length_of_its_trees_shortest():
    """Completions of 3 and 1 tokens, of 2 and 4 without a prompt: its first token has no row."""
    batch = pack(random_trees([(2, 3, 1), (0, 2, 4), (1, 5)]))
    parts = batch.cu_ld_parts.diff().tolist()
    assert parts == [1, 2, 1, 0, 1, 0, 1, 2, 5, 0]
    assert batch.cu_ld_parts[::2].tolist() == batch.cu_completions.tolist()


def test_what_comes_with_a_tree_is_laid_out_with_it():
    trees = [
        tree._replace(
            row=10 + tree.row,
            weight=0.5 * tree.row,
            label=tree.row != 1,
            per_completion={"margin": np.array([tree.row, -1.5])},
        )
        for tree in random_trees([(1, 2, 3)] * 3)
    ]
    batch = pack(trees, [2, 1])
    assert batch.rows == (10, 11, 12)
    assert batch.weights.tolist() == [0.0, 0.5, 1.0]
    assert batch.labels.tolist() == [True, False, True]
    assert batch.per_completion["margin"].tolist() == [0.0, -1.5, 1.0, -1.5, 2.0, -1.5]
    assert batch.cu_rows == (0, 2, 3)
    assert batch.cu_groups.tolist() == [0, 4, 6]


def test_groups_that_do_not_hold_all_trees_are_refused():
    with pytest.raises(ValueError, match="groups of 2 trees in all; wanted 3"):
        pack(random_trees([(1, 2)] * 3), [2])
    with pytest.raises(ValueError, match="got no trees"):
        pack([])


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
