"""Which rank computes which rows of a step: a pure function of the row lengths, which every rank
works out for itself.

Ranks that hold the whole model meet once a step, when their gradients are added up: what counts is
that each has the same work in all, however it packs it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


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
