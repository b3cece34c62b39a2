"""Which rank computes which rows of a step: a pure function of the row lengths, which every rank
works out for itself.

Ranks that hold the whole model meet once a step, when their gradients are added up: what counts is
that each has the same work in all, however it packs it. Ranks that hold one copy of the weights
together meet in every layer: each must have as many packs as the others, of about the same size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fasttr.packing.layout import dealt, evenly_filled, first_fit_decreasing, members_of


def even_shares(costs: Sequence[int], world: int) -> list[list[int]]:
    """Items dealt to the ranks, dearest first, each to the one with the least so far.

    Every item is in one share; with fewer items than ranks some shares are empty. Deterministic:
    ties go by position.
    """
    return members_of(dealt(costs, world), world)


def balance(costs: Sequence[int], world: int) -> float:
    """Mean cost of a share over that of the dearest one, which the others wait for; 1 is ideal."""
    loads = np.bincount(dealt(costs, world), weights=np.asarray(costs), minlength=world)
    return float(loads.sum() / (world * loads.max()))


def micro_steps(costs: Sequence[int], world: int, budget: int) -> list[list[list[int]]]:
    """Items in bins of at most `budget`, one for each rank in every micro-step; some are empty.

    As few micro-steps as even bins or first-fit need, with the dearest bins together: within one
    the others wait for the dearest. An item over the budget has a bin of its own.
    """
    budget = max(budget, 1)  # 0 means a bin for each item
    # An item over the budget fills a bin, and no more.
    least = sum(min(cost, budget) for cost in costs)
    number = world * max(1, -(-least // (world * budget)))
    while True:
        bins = evenly_filled(costs, number, budget)
        if bins is None:
            # Its work grows with items times bins: asked for only where even bins have no room.
            fullest = first_fit_decreasing(costs, budget)
            bins = fullest if len(fullest) <= number else None
        if bins is not None:
            return in_micro_steps(bins, costs, world)
        number += world


def in_micro_steps(
    bins: Sequence[list[int]], costs: Sequence[int], world: int
) -> list[list[list[int]]]:
    """Bins that are there, one for each rank in every micro-step; the last has empty ones."""
    by_cost = sorted(bins, key=lambda members: (-sum(costs[i] for i in members), members))
    filled = by_cost + [[] for _ in range(-len(by_cost) % world)]
    return [filled[first : first + world] for first in range(0, len(filled), world)]


def lockstep_balance(costs: Sequence[int], world: int, budget: int) -> float:
    """Cost of all items over what the ranks are kept busy for: the dearest bin of each micro-step,
    on all of them; 1 is ideal."""
    steps = micro_steps(costs, world, budget)
    dearest = sum(max(sum(costs[i] for i in members) for members in step) for step in steps)
    return sum(costs) / (world * dearest)
