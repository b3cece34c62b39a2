"""Packs over the budget: their parts hold every token once, see what they saw, and are as many as
every rank works out from lengths alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttr.data.in_memory import ListTrees
from fasttr.distributed.ranks import Ranks
from fasttr.packing.layout import pack
from fasttr.packing.parts import cut, number_of_parts, with_parts
from fasttr.packing.plan import pack_rows
from fasttr.packing.tiers import PADDED, SHARED, TIERS, model_tokens, unshared
from tests.tiny import random_trees


def test_a_pair_over_the_budget_by_hand():
    """A prompt of 3 with 5 and 4 tokens: 12 in all, 8 and 7 apart."""
    (tree,) = random_trees([(3, 5, 4)])
    batch = cut(pack([tree], budget=8), 8)
    prompt, (chosen, rejected) = tree.prompt_ids, tree.completions
    first, second = batch.parts
    assert first.input_ids.tolist() == [*prompt, *chosen]
    assert second.input_ids.tolist() == [*prompt, *rejected]
    assert second.position_ids.tolist() == list(range(7))
    assert second.attention.lengths() == ([7], [7])
    assert second.attention.keys.sources.tolist() == list(range(7))
    assert batch.input_ids.tolist() == [*prompt, *chosen, *prompt, *rejected]
    # What a loss reads is that of a pair.
    assert batch.cu_completions.tolist() == [0, 5, 9]
    assert batch.predicting.sources.tolist() == [2, 3, 4, 5, 6, 10, 11, 12, 13]


def test_a_pack_within_the_budget_stays_whole():
    trees = random_trees([(3, 5, 4), (2, 2, 2)])
    assert cut(pack(trees, budget=18), 18).parts == ()
    assert torch.equal(pack(trees, budget=18).input_ids, pack(trees).input_ids)


def test_completions_share_a_prompt_as_far_as_the_budget_goes():
    """3 + 4 + 4 are 11; the third of 4 has the prompt again, beside the fourth."""
    (tree,) = random_trees([(3, 4, 4, 4, 2)])
    batch = cut(pack([tree], budget=11), 11)
    assert [part.attention.lengths() for part in batch.parts] == [
        ([7, 4], [7, 7]),
        ([7, 2], [7, 5]),
    ]


@pytest.mark.parametrize("tier", TIERS)
def test_parts_are_within_the_budget_and_as_many_as_lengths_say(tier):
    rng = np.random.default_rng(3)
    shapes = [tuple(rng.integers(1, 20, rng.integers(2, 6)).tolist()) for _ in range(60)]
    shapes = [(shape[0] - 1, *(shape[1:] * 3)[:3]) for shape in shapes]
    several = 0
    for tree in random_trees(shapes):
        tree = tree._replace(row=0)
        trees = ListTrees([tree])
        batch = cut(pack([tree if tier == SHARED else unshared(tree)], budget=24), 24, tier)
        number = number_of_parts(trees, 0, 24, tier)
        assert max(len(batch.parts), 1) == number
        for part in batch.parts:
            lengths, keys = part.attention.lengths()
            sequences = lengths if tier != PADDED else keys
            assert len(lengths) == 1 or model_tokens(tier, sequences) <= 24
        tokens = [x for part in batch.parts for x in part.input_ids.tolist()]
        assert not batch.parts or tokens == batch.input_ids.tolist()
        several += number > 1
    assert several > 20


def test_ranks_that_meet_in_every_layer_have_as_many_parts_as_the_others():
    rng = np.random.default_rng(5)
    shapes = [tuple(rng.integers(1, 13, 3).tolist()) for _ in range(13)]
    trees = ListTrees([t._replace(row=i) for i, t in enumerate(random_trees(shapes))])
    of_ranks = []
    for rank in range(3):
        ranks = Ranks(rank, 3, shard_size=3)
        of_ranks.append(pack_rows(trees, np.arange(13), 24, ranks=ranks, cuts=True))
    rows = [row for packs in of_ranks for batch in packs for row in batch.rows]
    assert sorted(rows) == list(range(13))
    passes = [[max(len(batch.parts), 1) for batch in packs] for packs in of_ranks]
    assert passes[0] == passes[1] == passes[2]
    assert len(set(passes[0])) > 1


def test_a_pack_is_filled_up_with_parts_that_do_nothing():
    tree, other = random_trees([(3, 5, 4), (2, 2, 2)])
    whole = with_parts(pack([tree]), 3, tree)
    assert [len(part.input_ids) for part in whole.parts] == [12, 2, 2]
    halves = with_parts(cut(pack([other], budget=4), 4), 3, other)
    assert [len(part.input_ids) for part in halves.parts] == [4, 4, 2]
    assert with_parts(pack([tree]), 1, tree).parts == ()
