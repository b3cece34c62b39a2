"""Trees to packs: which trees share a pack, and where every token, key and scored row lies in it.

Layout of a tree: [prompt | c1 | c2 | ...], once. The queries stay in that order, cut into the
segments (prompt + c1), (c2), ...; the keys are gathered so that segment i sees (prompt + ci).
Causal, aligned at the end: exact for any attention kernel that takes separate query and key
offsets.

Legend: T packed tokens, S gathered key rows, R scored rows, N completions, B trees, G groups of
trees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fasttr.batch import AttentionLayout, PackedBatch, RowGather, Tree


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Partition items into bins whose sizes sum to at most `budget`; an item over the budget gets a
    bin of its own.

    Deterministic: ties keep their order, items within a bin and bins themselves are ordered by
    first position.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for b, free in enumerate(room):
            if sizes[item] <= free:
                bins[b].append(item)
                room[b] -= sizes[item]
                break
        else:
            bins.append([item])
            room.append(budget - sizes[item])
    return sorted(sorted(b) for b in bins)


def pack(trees: Sequence[Tree], group_sizes: Sequence[int] | None = None) -> PackedBatch:
    """Lay `trees` out in one packed row; completions keep their order.

    `group_sizes`: how many consecutive trees are a group, which a loss must see whole; by default
    each is its own.
    """
    if not trees:
        raise ValueError("pack: got no trees; wanted at least one")
    per_tree = np.array([len(tree.completions) for tree in trees])
    parts = [part for tree in trees for part in (tree.prompt_ids, *tree.completions)]
    part_lengths = np.array([len(part) for part in parts])
    ids_T = np.concatenate(parts).astype(np.int64)
    part_starts = np.concatenate(([0], np.cumsum(part_lengths)[:-1]))

    # Position of each tree's prompt among the parts, and of each completion.
    prompt_part_B = np.concatenate(([0], np.cumsum(1 + per_tree)[:-1]))
    is_prompt = np.zeros(len(parts), dtype=bool)
    is_prompt[prompt_part_B] = True
    ordinal_N = np.concatenate([np.arange(m) for m in per_tree])
    prompt_len_N = np.repeat(part_lengths[prompt_part_B], per_tree)
    prompt_start_N = np.repeat(part_starts[prompt_part_B], per_tree)
    length_N = part_lengths[~is_prompt]
    start_N = part_starts[~is_prompt]

    base = np.zeros(len(parts), dtype=np.int64)
    base[~is_prompt] = prompt_len_N
    positions_T = _ramp(part_lengths) + np.repeat(base, part_lengths)

    q_lengths = np.where(ordinal_N == 0, prompt_len_N + length_N, length_N)
    k_lengths = prompt_len_N + length_N
    j_S = _ramp(k_lengths)
    in_prompt_S = j_S < np.repeat(prompt_len_N, k_lengths)
    key_S = np.where(
        in_prompt_S,
        np.repeat(prompt_start_N, k_lengths) + j_S,
        np.repeat(start_N - prompt_len_N, k_lengths) + j_S,
    )
    keys = _gather(key_S, np.where(in_prompt_S, np.repeat(ordinal_N, k_lengths), 0), len(ids_T))

    # The first token of a completion is predicted by the prompt's last row; without a prompt
    # nothing predicts it.
    has_prompt_N = (prompt_len_N > 0).astype(np.int64)
    rows_N = length_N - 1 + has_prompt_N
    j_R = _ramp(rows_N) + np.repeat(1 - has_prompt_N, rows_N)
    target_R = np.repeat(start_N, rows_N) + j_R
    from_prompt_R = j_R == 0
    scored_R = np.where(
        from_prompt_R, np.repeat(prompt_start_N + prompt_len_N - 1, rows_N), target_R - 1
    )
    scored = _gather(scored_R, np.where(from_prompt_R, np.repeat(ordinal_N, rows_N), 0), len(ids_T))

    cu_rows = _offsets(np.array(group_sizes if group_sizes is not None else [1] * len(trees)))
    if int(cu_rows[-1]) != len(trees):
        raise ValueError(
            f"pack: got groups of {int(cu_rows[-1])} trees in all; wanted {len(trees)}"
        )
    shortest_N = np.repeat(np.minimum.reduceat(length_N, np.cumsum(per_tree) - per_tree), per_tree)
    heads_N = shortest_N - 1 + has_prompt_N
    return PackedBatch(
        input_ids=torch.from_numpy(ids_T),
        position_ids=torch.from_numpy(positions_T),
        attention=AttentionLayout(
            cu_q=_offsets(q_lengths).to(torch.int32),
            cu_k=_offsets(k_lengths).to(torch.int32),
            q_lengths=tuple(q_lengths.tolist()),
            k_lengths=tuple(k_lengths.tolist()),
            keys=keys,
        ),
        scored=scored,
        target=torch.from_numpy(ids_T[target_R]),
        cu_completions=_offsets(rows_N),
        cu_groups=_offsets(per_tree)[cu_rows],
        cu_rows=tuple(cu_rows.tolist()),
        cu_heads=_offsets(np.stack([heads_N, rows_N - heads_N], axis=1).reshape(-1)),
        token_counts=torch.from_numpy(length_N.astype(np.int64)),
        weights=torch.tensor([tree.weight for tree in trees], dtype=torch.float32),
        labels=torch.tensor([tree.label for tree in trees], dtype=torch.bool),
        rows=tuple(tree.row for tree in trees),
        num_tokens=int(k_lengths.sum()),
    )


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each n in `lengths`, concatenated."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(
        ends - lengths, lengths
    )


def _offsets(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def _gather(index: np.ndarray, reader: np.ndarray, source_rows: int) -> RowGather:
    """A gather whose output row j is the `reader[j]`-th reader of source row `sources[j]`."""
    if len(index) == source_rows and np.array_equal(index, np.arange(source_rows)):
        return RowGather(None, ())
    levels = []
    for level in range(int(reader.max(initial=-1)) + 1):
        outputs = np.flatnonzero(reader == level)
        levels.append((torch.from_numpy(index[outputs]), torch.from_numpy(outputs)))
    return RowGather(torch.from_numpy(index), tuple(levels))
