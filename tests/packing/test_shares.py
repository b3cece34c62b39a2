"""Which rank computes which rows: all of them once, in shares as even as can be."""

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
