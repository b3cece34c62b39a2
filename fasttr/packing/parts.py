"""A pack over the budget of tokens in parts, which go through the layers one after the other.

A loss must see a pair, or a group of rows, whole; layers need only a prompt and its completion. So
a tree over the budget is laid out as its completions, the prompt repeated, and the pack is cut
between them. What cannot be cut is one completion with its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fasttr.batch import PackedBatch, Part, Tree, TreeSource, own_prompt_lengths
from fasttr.packing.layout import completion_runs, gather_of, idle_pack
from fasttr.packing.tiers import SHARED, model_tokens


def cut(batch: PackedBatch, budget: int, tier: str = SHARED) -> PackedBatch:
    """A pack that was laid out for `budget`, with parts of at most so many tokens of the model
    where it is over."""
    queries, keys = batch.attention.lengths()
    # A segment that asks with all that it sees begins with a prompt.
    starts = [i for i, (q, k) in enumerate(zip(queries, keys, strict=True)) if q == k]
    ends = [*starts[1:], len(queries)]
    sizes = [sum(queries[start:end]) for start, end in zip(starts, ends, strict=True)]
    if model_tokens(tier, sizes) <= budget:
        return batch
    runs = _neighbours(sizes, budget, tier)
    parts = [_part(batch, slice(starts[run.start], ends[run.stop - 1])) for run in runs]
    return batch._replace(parts=tuple(parts))


def number_of_parts(trees: TreeSource, row: int, budget: int, tier: str = SHARED) -> int:
    """Parts of a pack of one row, which is not read for it."""
    completions = trees.completion_lengths[row].tolist()
    own = own_prompt_lengths(trees, np.array([row]))[0].tolist()
    if tier == SHARED and len(set(own)) == 1:
        runs = completion_runs(own[0], completions, budget)
        sizes = [own[0] + sum(completions[run]) for run in runs]
    else:
        sizes = [prompt + length for prompt, length in zip(own, completions, strict=True)]
    return len(_neighbours(sizes, budget, tier))


def with_parts(batch: PackedBatch, number: int, tree: Tree) -> PackedBatch:
    """A pack in exactly `number` parts, of which some may do nothing: ranks that meet in every
    layer go through the layers equally often. `tree` shows how the pack's trees are made."""
    if number == 1:
        return batch
    idle = _whole(idle_pack(tree))
    parts = batch.parts or (_whole(batch),)
    return batch._replace(parts=parts + (idle,) * (number - len(parts)))


def _neighbours(sizes: Sequence[int], budget: int, tier: str) -> list[slice]:
    """Neighbouring stems that are at most `budget` tokens of the model together."""
    found: list[slice] = []
    for place, _ in enumerate(sizes):
        start = found[-1].start if found else 0
        if found and model_tokens(tier, sizes[start : place + 1]) <= budget:
            found[-1] = slice(start, place + 1)
        else:
            found.append(slice(place, place + 1))
    return found


def _whole(batch: PackedBatch) -> Part:
    return Part(batch.input_ids, batch.position_ids, batch.attention)


def _part(batch: PackedBatch, segments: slice) -> Part:
    """The tokens of some segments, which see nothing of the others."""
    offsets = batch.attention.on_host[:, segments.start : segments.stop + 1]
    (first, *_, last), (first_key, *_, last_key) = offsets.tolist()
    keys = batch.attention.keys.sources[first_key:last_key] - first
    on_host = offsets - offsets[:, :1]
    return Part(
        batch.input_ids[first:last],
        batch.position_ids[first:last],
        batch.attention._replace(
            cu_q=on_host[0],
            cu_k=on_host[1],
            on_host=on_host,
            keys=gather_of(keys.numpy(), last - first),
        ),
    )
