"""Bins of rows in each tier, by hand."""

from __future__ import annotations

import numpy as np

from fasttr.data.in_memory import ListTrees
from fasttr.packing.layout import pack
from fasttr.packing.plan import pack_rows
from fasttr.packing.tiers import (
    longest_sequence,
    model_tokens,
    padded_bins,
    sequence_lengths,
    tree_sizes,
    unshared,
)
from tests.tiny import random_trees

SHAPES = [(7, 2, 1), (1, 3, 5), (4, 4, 4), (0, 2, 9)]
TREES = ListTrees(random_trees(SHAPES))
ROWS = np.arange(4)


def test_lengths_of_rows():
    assert sequence_lengths(TREES, ROWS).tolist() == [[9, 8], [4, 6], [8, 8], [2, 9]]
    assert longest_sequence(TREES) == 9
    assert tree_sizes(TREES, ROWS).tolist() == [10, 9, 12, 11]


def test_padded_bins_hold_neighbours_in_length():
    # Longest first: 4 sequences of 9 are 36 tokens; with 6 of them 54 would be over the budget.
    assert padded_bins([2, 2, 2, 2], [9, 6, 8, 9], budget=40) == [[0, 3], [1, 2]]
    assert padded_bins([2, 2, 2, 2], [9, 6, 8, 9], budget=72) == [[0, 1, 2, 3]]
    assert padded_bins([2, 2], [9, 9], budget=10) == [[0], [1]]


def test_what_a_model_is_given():
    assert model_tokens("padded", [9, 8, 2, 9]) == 36
    assert model_tokens("packed", [9, 8, 2, 9]) == 28


def test_packs_of_the_other_tiers_repeat_the_prompt():
    for tier in ("packed", "padded"):
        packs = pack_rows(TREES, ROWS, 40, tier=tier)
        assert sorted(row for batch in packs for row in batch.rows) == [0, 1, 2, 3]
        assert all(not batch.attention.keys.offsets.diff().ne(1).any() for batch in packs)
    (shared,) = pack_rows(TREES, ROWS, 100)
    assert shared.attention.keys.offsets.diff().max() == 2
    # Rows of 17, 10, 16 and 11 tokens with their prompts repeated.
    assert [len(batch.input_ids) for batch in pack_rows(TREES, ROWS, 40, tier="packed")] == [27, 27]
    assert [batch.rows for batch in pack_rows(TREES, ROWS, 40, tier="padded")] == [(0, 3), (1, 2)]


def test_a_tree_taken_apart_predicts_the_same_tokens():
    (tree,) = random_trees([(3, 2, 4)])
    shared, apart = pack([tree]), pack([unshared(tree)])
    assert apart.target.tolist() == shared.target.tolist()
    assert apart.position_ids.tolist() == [*range(5), *range(7)]
    assert apart.cu_completions.tolist() == shared.cu_completions.tolist()
    assert unshared(unshared(tree)) == unshared(tree)
