"""Trees to packs: where every token, key and predicting row lies in a pack.

Layout of a tree: [prompt | c1 | c2 | ...], once; of one whose completions do not share their prompt
[prompt 1 | c1 | prompt 2 | c2 | ...]: a stem is a prompt with the completions that share it.
The queries stay in that order, cut into the segments (prompt + c1), (c2), ...; the keys are
gathered so that segment i sees (prompt + ci). Causal, aligned at the end: exact for any attention
kernel that takes separate query and key offsets.

Legend: T packed tokens, S gathered key rows, R predicting rows, N completions, B trees, M stems, G
groups, P parts (every prompt and every completion).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fasttr.batch import AttentionLayout, PackedBatch, RowGather, Tree


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Partition items into bins whose sizes sum to at most `budget`.

    An item over the budget gets a bin of its own. Deterministic: ties keep their order, items
    within a bin and bins themselves are ordered by first position.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = next((b for b, free in enumerate(room) if sizes[item] <= free), None)
        if fitting is None:
            bins.append([item])
            room.append(budget - sizes[item])
        else:
            bins[fitting].append(item)
            room[fitting] -= sizes[item]
    return sorted(sorted(members) for members in bins)


def dealt(costs: Sequence[int] | np.ndarray, bins: int) -> np.ndarray:
    """(len(costs),) which of `bins` each item is dealt to: dearest first, each to the bin with the
    least so far. Ties go by position, of items and of bins.

    Items that go to different bins, whatever those before them cost, are dealt at once: the work
    grows little faster than that of sorting the costs.
    """
    costs = np.asarray(costs, dtype=np.int64)
    owner = np.empty(len(costs), dtype=np.int64)
    loads = np.zeros(bins, dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    first = 0
    while first < len(order):
        emptiest = np.argsort(loads, kind="stable")[: len(order) - first]
        found = loads[emptiest] + costs[order[first : first + len(emptiest)]]
        # A bin is the next as long as none before it is emptier, now that it has an item more.
        is_next = loads[emptiest[1:]] < np.minimum.accumulate(found)[:-1]
        count = 1 + (len(is_next) if is_next.all() else int(is_next.argmin()))
        owner[order[first : first + count]] = emptiest[:count]
        loads[emptiest[:count]] = found[:count]
        first += count
    return owner


def members_of(owner: np.ndarray, bins: int) -> list[list[int]]:
    """The items of each bin, in order."""
    order = np.argsort(owner, kind="stable").tolist()
    ends = np.cumsum(np.bincount(owner, minlength=bins)).tolist()
    return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def evenly_filled(costs: Sequence[int], bins: int, budget: int) -> list[list[int]] | None:
    """Items in `bins` bins as `dealt`; None where two of them together are over the budget."""
    owner = dealt(costs, bins)
    loads = np.bincount(owner, weights=np.asarray(costs), minlength=bins)
    is_shared = np.bincount(owner, minlength=bins) > 1
    return None if (loads[is_shared] > budget).any() else members_of(owner, bins)


def balanced_bins(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """As few bins as `first_fit_decreasing` needs, of about equal sizes: their peak is lower, and
    no small rest costs a pass of its own. Where even bins have no room, the fullest stay.
    """
    fullest = first_fit_decreasing(sizes, budget)
    if len(fullest) < 2:
        return fullest
    return sorted(evenly_filled(sizes, len(fullest), budget) or fullest)


def pack(
    trees: Sequence[Tree],
    group_sizes: Sequence[int] | None = None,
    budget: int | None = None,
) -> PackedBatch:
    """Lay `trees` out in one packed row; completions keep their order.

    `group_sizes`: how many consecutive trees are a group, which a loss must see whole; by default
    each tree is its own. `budget`: tokens that a prompt and the completions that share it take at
    most; beyond, the prompt is there again (`completion_runs`).
    """
    if not trees:
        raise ValueError("pack: got no trees; wanted at least one")
    sizes = np.array(group_sizes if group_sizes is not None else [1] * len(trees))
    if int(sizes.sum()) != len(trees):
        raise ValueError(
            f"pack: got groups of {int(sizes.sum())} trees in all; wanted {len(trees)}"
        )
    parts = _parts_of(trees, budget)
    predicting, target_T, lengths_N = _predicting_rows(parts)
    cu_rows = _offsets(sizes)
    return PackedBatch(
        input_ids=torch.from_numpy(parts.ids_T),
        position_ids=torch.from_numpy(_positions(parts)),
        attention=_attention_layout(parts),
        predicting=predicting,
        target=torch.from_numpy(parts.ids_T[target_T]),
        cu_completions=_offsets(lengths_N),
        cu_groups=_offsets(parts.completions_B)[cu_rows],
        cu_rows=tuple(cu_rows.tolist()),
        cu_ld_parts=_offsets(_ld_parts(parts, lengths_N)),
        token_counts=torch.from_numpy(parts.length_N),
        weights=torch.tensor([tree.weight for tree in trees], dtype=torch.float32),
        labels=torch.tensor([tree.label for tree in trees], dtype=torch.bool),
        per_completion=_per_completion(trees),
        rows=tuple(tree.row for tree in trees),
    )


def idle_pack(tree: Tree) -> PackedBatch:
    """A pack without a row: two tokens, so that a rank with nothing to do goes through every layer
    when the others do. `tree` shows how the pack's trees are made."""
    token = np.zeros(1, dtype=np.int32)
    stand_in = tree._replace(prompt_ids=token, completions=(token,))
    if tree.prompt_skips is not None:
        stand_in = stand_in._replace(prompt_skips=(0,))
    one = {name: np.zeros(1, dtype=np.float32) for name in tree.per_completion}
    return pack([stand_in._replace(per_completion=one)])._replace(rows=())


class _Parts(NamedTuple):
    """Prompts and completions in the order in which they lie in the pack, all int64."""

    ids_T: np.ndarray
    length_P: np.ndarray
    is_prompt_P: np.ndarray  # bool
    completions_B: np.ndarray  # completions of each tree
    ordinal_N: np.ndarray  # place of a completion in its stem, from 0
    length_N: np.ndarray
    start_N: np.ndarray  # its first token's place in the pack
    prompt_length_N: np.ndarray
    prompt_start_N: np.ndarray


def _of_one_prompt(trees: Sequence[Tree]) -> list[Tree]:
    """Consecutive trees that share one prompt as one tree, so that it lies in the pack once."""
    joined: list[Tree] = []
    for tree in trees:
        before = joined[-1] if joined else None
        if before is not None and _shares(before, tree):
            joined[-1] = before._replace(completions=before.completions + tree.completions)
        else:
            joined.append(tree)
    return joined


def _shares(a: Tree, b: Tree) -> bool:
    is_taken_apart = a.prompt_skips is not None or b.prompt_skips is not None
    return not is_taken_apart and np.array_equal(a.prompt_ids, b.prompt_ids)


def _parts_of(trees: Sequence[Tree], budget: int | None) -> _Parts:
    stems = [stem for tree in _of_one_prompt(trees) for stem in _stems(tree, budget)]
    pieces = [ids for stem in stems for ids in (stem.prompt_ids, *stem.completions)]
    length_P = np.array([len(ids) for ids in pieces], dtype=np.int64)
    start_P = np.cumsum(length_P) - length_P
    completions_M = np.array([len(stem.completions) for stem in stems])
    prompt_place_M = np.cumsum(1 + completions_M) - (1 + completions_M)
    is_prompt_P = np.zeros(len(pieces), dtype=bool)
    is_prompt_P[prompt_place_M] = True
    return _Parts(
        ids_T=np.concatenate(pieces).astype(np.int64),
        length_P=length_P,
        is_prompt_P=is_prompt_P,
        completions_B=np.array([len(tree.completions) for tree in trees]),
        ordinal_N=_ramp(completions_M),
        length_N=length_P[~is_prompt_P],
        start_N=start_P[~is_prompt_P],
        prompt_length_N=np.repeat(length_P[prompt_place_M], completions_M),
        prompt_start_N=np.repeat(start_P[prompt_place_M], completions_M),
    )


class _Stem(NamedTuple):
    prompt_ids: np.ndarray
    completions: tuple[np.ndarray, ...]


def _stems(tree: Tree, budget: int | None) -> list[_Stem]:
    """A tree whose prompt is shared is one, or as many as `budget` asks for; else each completion
    has its own."""
    if tree.prompt_skips is None:
        runs = completion_runs(len(tree.prompt_ids), [len(c) for c in tree.completions], budget)
        return [_Stem(tree.prompt_ids, tree.completions[run]) for run in runs]
    return [
        _Stem(tree.prompt_ids[skip:], (completion,))
        for skip, completion in zip(tree.prompt_skips, tree.completions, strict=True)
    ]


def completion_runs(prompt: int, completions: Sequence[int], budget: int | None) -> list[slice]:
    """Neighbouring completions that share a prompt within `budget` tokens; lengths, not tokens."""
    starts, held = [0], prompt
    for place, length in enumerate(completions):
        if budget is not None and held + length > budget and place > starts[-1]:
            starts.append(place)
            held = prompt
        held += length
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(completions)])]


def _positions(parts: _Parts) -> np.ndarray:
    """(T,) position ids: those of every completion continue from the prompt's length."""
    first_P = np.zeros(len(parts.length_P), dtype=np.int64)
    first_P[~parts.is_prompt_P] = parts.prompt_length_N
    return _ramp(parts.length_P) + np.repeat(first_P, parts.length_P)


def _attention_layout(parts: _Parts) -> AttentionLayout:
    """Segment i asks with completion i (the first with the prompt too) and sees (prompt + ci)."""
    has_prompt_N = parts.ordinal_N == 0
    q_lengths = parts.length_N + np.where(has_prompt_N, parts.prompt_length_N, 0)
    k_lengths = parts.length_N + parts.prompt_length_N
    place_S = _ramp(k_lengths)
    in_prompt_S = place_S < np.repeat(parts.prompt_length_N, k_lengths)
    from_prompt_S = np.repeat(parts.prompt_start_N, k_lengths) + place_S
    from_own_S = np.repeat(parts.start_N - parts.prompt_length_N, k_lengths) + place_S
    on_host = torch.stack([_offsets(q_lengths), _offsets(k_lengths)]).to(torch.int32)
    return AttentionLayout(
        cu_q=on_host[0],
        cu_k=on_host[1],
        on_host=on_host,
        keys=gather_of(np.where(in_prompt_S, from_prompt_S, from_own_S), len(parts.ids_T)),
    )


def _predicting_rows(parts: _Parts) -> tuple[RowGather, np.ndarray, np.ndarray]:
    """The rows that predict completion tokens, the places of those tokens, and how many each has.

    The first token of a completion is predicted by the prompt's last row; without a prompt nothing
    predicts it.
    """
    has_prompt_N = (parts.prompt_length_N > 0).astype(np.int64)
    lengths_N = parts.length_N - 1 + has_prompt_N
    place_R = _ramp(lengths_N) + np.repeat(1 - has_prompt_N, lengths_N)
    target_R = np.repeat(parts.start_N, lengths_N) + place_R
    is_first_R = place_R == 0
    end_of_prompt_R = np.repeat(parts.prompt_start_N + parts.prompt_length_N - 1, lengths_N)
    source_R = np.where(is_first_R, end_of_prompt_R, target_R - 1)
    return gather_of(source_R, len(parts.ids_T)), target_R, lengths_N


def _ld_parts(parts: _Parts, lengths_N: np.ndarray) -> np.ndarray:
    """(2N,) predicting rows of each completion up to its tree's shortest length, and beyond."""
    first_N = np.cumsum(parts.completions_B) - parts.completions_B
    shortest_N = np.repeat(np.minimum.reduceat(parts.length_N, first_N), parts.completions_B)
    unpredicted_N = parts.length_N - lengths_N
    upto_N = shortest_N - unpredicted_N
    return np.stack([upto_N, lengths_N - upto_N], axis=1).reshape(-1)


def _per_completion(trees: Sequence[Tree]) -> dict[str, torch.Tensor]:
    columns = {}
    for name in trees[0].per_completion:
        values = np.concatenate([np.asarray(tree.per_completion[name]) for tree in trees])
        columns[name] = torch.from_numpy(values.astype(np.float32))
    return columns


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each n in `lengths`, concatenated."""
    ends = np.cumsum(lengths)
    total = ends[-1] if len(ends) else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - lengths, lengths)


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def gather_of(sources: np.ndarray, source_rows: int) -> RowGather:
    """The gather of rows `sources` (S,) among so many, with its inverse."""
    counts = np.bincount(sources, minlength=source_rows)
    vectors = sources, np.concatenate(([0], np.cumsum(counts))), np.argsort(sources, kind="stable")
    return RowGather(*(torch.from_numpy(x.astype(np.int32)) for x in vectors))
