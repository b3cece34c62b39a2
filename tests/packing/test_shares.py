"""Which rank computes which rows: all of them once, in shares as even as can be; and in step, where
ranks meet in every layer."""

import numpy as np
import pytest

from fasttr.data.in_memory import ListTrees
from fasttr.distributed.ranks import Ranks
from fasttr.packing.layout import dealt
from fasttr.packing.plan import pack_rows
from fasttr.packing.shares import balance, even_shares, lockstep_balance, micro_steps
from tests.tiny import random_trees


def costs_of(rows: int, seed: int) -> list[int]:
    """Lengths as long-tailed as those of conversations."""
    lengths = np.random.default_rng(seed).lognormal(5.5, 0.6, rows)
    return lengths.astype(int).clip(1, 2000).tolist()


@pytest.mark.parametrize("world", range(1, 10))
def test_every_row_is_in_one_share(world):
    for rows in range(1, 41):
        shares = even_shares(costs_of(rows, seed=rows), world)
        assert len(shares) == world
        assert sorted(row for share in shares for row in share) == list(range(rows))


@pytest.mark.parametrize("world", [2, 3, 8, 9, 64])
def test_the_shares_are_even_where_there_are_eight_rows_a_rank(world):
    found = [balance(costs_of(8 * world, seed), world) for seed in range(20)]
    assert min(found) > 0.95
    assert max(found) <= 1


def test_the_balance_is_the_mean_share_over_the_dearest_one():
    """Dealt dearest first: 7 and 2, 5 and 3, then 1 where there is less."""
    assert even_shares([7, 5, 3, 2, 1], 2) == [[0, 3], [1, 2, 4]]
    assert balance([7, 5, 3, 2, 1], 2) == pytest.approx(18 / (2 * 9))
    assert balance([9, 4, 2], 2) == pytest.approx(15 / (2 * 9))
    assert balance([9], 3) == pytest.approx(1 / 3)


def test_the_packs_of_all_ranks_are_the_rows_of_the_step():
    trees = ListTrees(random_trees([(5, 4, 7), (3, 6, 2), (9, 1, 1), (2, 3, 3), (4, 4, 4)]))
    found = []
    for rank in range(3):
        packs = pack_rows(trees, np.arange(5), budget=20, ranks=Ranks(rank, 3))
        assert all(len(batch.input_ids) <= 20 for batch in packs)
        found += [row for batch in packs for row in batch.rows]
    assert sorted(found) == list(range(5))


def dealt_one_by_one(costs: list[int], bins: int) -> list[int]:
    """The rule as it is written: the dearest item next, to the first of the emptiest bins."""
    loads, owner = [0] * bins, [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        emptiest = loads.index(min(loads))
        owner[item] = emptiest
        loads[emptiest] += costs[item]
    return owner


@pytest.mark.parametrize("bins", [1, 2, 7, 64])
def test_dealing_many_at_once_is_dealing_one_by_one(bins):
    """Ties among them: costs of few values."""
    rng = np.random.default_rng(bins)
    for rows in (1, 2, 63, 200):
        for highest in (3, 2000):
            costs = rng.integers(1, highest, rows).tolist()
            assert dealt(costs, bins).tolist() == dealt_one_by_one(costs, bins)


def test_planning_a_step_of_many_ranks_does_not_ask_every_bin_for_every_row(monkeypatch):
    """16,384 rows on 1,024 ranks: first-fit would compare each row with hundreds of bins."""

    def refused(*args):
        raise AssertionError("first-fit was asked for")

    monkeypatch.setattr("fasttr.packing.shares.first_fit_decreasing", refused)
    costs = costs_of(16 * 1024, seed=3)
    steps = micro_steps(costs, 1024, 8192)
    assert sorted(item for step in steps for bin_ in step for item in bin_) == list(range(16384))
    assert all(len(step) == 1024 for step in steps)
    assert lockstep_balance(costs, 1024, 8192) > 0.95


# in step


@pytest.mark.parametrize("world", range(1, 10))
def test_every_row_is_in_one_bin_of_a_micro_step_that_has_one_for_each_rank(world):
    for rows in range(1, 41):
        costs = costs_of(rows, seed=rows)
        steps = micro_steps(costs, world, budget=2500)
        assert all(len(step) == world for step in steps)
        assert sorted(row for step in steps for bin_ in step for row in bin_) == list(range(rows))
        assert all(sum(costs[row] for row in bin_) <= 2500 for step in steps for bin_ in step)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_in_step_are_busy_where_there_are_eight_rows_a_rank(world):
    found = [lockstep_balance(costs_of(8 * world, seed), world, 8192) for seed in range(20)]
    assert min(found) > 0.9
    assert sum(found) / len(found) > 0.95
    assert max(found) <= 1


def test_the_dearest_bins_are_together():
    """Three bins of at most 10 are needed, so that two ranks go twice; the last row fills one."""
    assert micro_steps([9, 8, 4, 3], 2, 10) == [[[0], [1]], [[2], [3]]]
    assert lockstep_balance([9, 8, 4, 3], 2, 10) == pytest.approx(24 / (2 * (9 + 4)))
    # One that is over the budget has a bin of its own.
    assert micro_steps([30, 4], 2, 10) == [[[0], [1]]]


@pytest.mark.parametrize("tier", ["shared", "packed", "padded"])
def test_each_rank_has_as_many_packs_and_an_idle_one_has_two_tokens(tier):
    trees = ListTrees(random_trees([(5, 4, 7), (3, 6, 2), (9, 1, 1)]))
    packs = [
        pack_rows(trees, np.arange(3), budget=40, tier=tier, ranks=Ranks(rank, 2, shard_size=2))
        for rank in range(2)
    ]
    assert len(packs[0]) == len(packs[1])
    rows = [row for of_rank in packs for batch in of_rank for row in batch.rows]
    assert sorted(rows) == [0, 1, 2]
    alone = pack_rows(trees, np.arange(1), budget=40, tier=tier, ranks=Ranks(1, 2, shard_size=2))
    assert [batch.rows for batch in alone] == [()]
    assert alone[0].input_ids.tolist() == [0, 0]
    assert alone[0].target.tolist() == [0]
