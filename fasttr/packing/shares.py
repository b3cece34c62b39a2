"""Which rank computes which rows of a step: a pure function of the row lengths, which every rank
works out for itself.

Ranks that hold the whole model meet once a step, when their gradients are added up: what counts is
that each has the same work in all, however it packs it. Ranks that hold one copy of the weights
together meet in every layer: each must have as many packs as the others, of about the same size.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from fasttr.packing.layout import first_fit_decreasing


def even_shares(costs: Sequence[int], world: int) -> list[list[int]]:
    """Items dealt to the ranks, dearest first, each to the one with the least so far.

    Every item is in one share; with fewer items than ranks some shares are empty. Deterministic:
    ties go by position.
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    least = [(0, rank) for rank in range(world)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, rank = heapq.heappop(least)
        shares[rank].append(item)
        heapq.heappush(least, (cost + costs[item], rank))
    return [sorted(share) for share in shares]


def balance(costs: Sequence[int], world: int) -> float:
    """Mean cost of a share over that of the dearest one, which the others wait for; 1 is ideal."""
    dearest = max(sum(costs[i] for i in share) for share in even_shares(costs, world))
    return sum(costs) / (world * dearest)


def micro_steps(costs: Sequence[int], world: int, budget: int) -> list[list[list[int]]]:
    """Items in bins of at most `budget`, one for each rank in every micro-step; some are empty.

    As few micro-steps as first-fit needs, with the dearest bins together: within one the others
    wait for the dearest. An item over the budget has a bin of its own.
    """
    fewest = first_fit_decreasing(costs, budget)
    number = -(-len(fewest) // world) * world
    bins = _evenly_filled(costs, number, budget) or fewest
    return in_micro_steps(bins, costs, world)


def in_micro_steps(
    bins: Sequence[list[int]], costs: Sequence[int], world: int
) -> list[list[list[int]]]:
    """Bins that are there, one for each rank in every micro-step; the last has empty ones."""
    by_cost = sorted(bins, key=lambda members: (-sum(costs[i] for i in members), members))
    filled = by_cost + [[] for _ in range(-len(by_cost) % world)]
    return [filled[first : first + world] for first in range(0, len(filled), world)]


def _evenly_filled(costs: Sequence[int], number: int, budget: int) -> list[list[int]] | None:
    """`number` bins, dearest items first, each into the one with the least so far; None where that
    one has no room for it."""
    bins: list[list[int]] = [[] for _ in range(number)]
    least = [(0, i) for i in range(number)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, chosen = heapq.heappop(least)
        if bins[chosen] and cost + costs[item] > budget:
            return None
        bins[chosen].append(item)
        heapq.heappush(least, (cost + costs[item], chosen))
    return [sorted(members) for members in bins]


def lockstep_balance(costs: Sequence[int], world: int, budget: int) -> float:
    """Cost of all items over what the ranks are kept busy for: the dearest bin of each micro-step,
    on all of them; 1 is ideal."""
    steps = micro_steps(costs, world, budget)
    dearest = sum(max(sum(costs[i] for i in members) for members in step) for step in steps)
    return sum(costs) / (world * dearest)
