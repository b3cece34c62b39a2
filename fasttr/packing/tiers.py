"""How rows of data share one call of the model: three tiers, of which a model gets the cheapest
that is exact for it.

Legend: B rows, m completions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fasttr.batch import Tree, TreeSource, own_prompt_lengths
from fasttr.packing.layout import balanced_bins

SHARED = "shared"  # one row of tokens, each prompt once
PACKED = "packed"  # one row of tokens, a prompt for every completion
PADDED = "padded"  # a row of tokens for every completion
TIERS = (SHARED, PACKED, PADDED)  # the cheapest first
AUTO = "auto"  # the first that is exact


def unshared(tree: Tree) -> Tree:
    """The tree with a prompt for every completion."""
    if tree.prompt_skips is not None:
        return tree
    return tree._replace(prompt_skips=(0,) * len(tree.completions))


def sequence_lengths(trees: TreeSource, rows: np.ndarray | Sequence[int]) -> np.ndarray:
    """(B, m) tokens of each completion with its prompt."""
    return own_prompt_lengths(trees, rows) + trees.completion_lengths[rows]


def longest_sequence(trees: TreeSource) -> int:
    """Tokens of the longest completion with its prompt, of all rows."""
    return int(sequence_lengths(trees, np.arange(len(trees))).max())


def tree_sizes(trees: TreeSource, rows: np.ndarray | Sequence[int]) -> np.ndarray:
    """(B,) packed tokens of each tree: the prompt once and every completion."""
    completions = trees.completion_lengths[rows].sum(axis=1, dtype=np.int64)
    if trees.prompt_skips is None:
        return trees.prompt_lengths[rows] + completions
    is_shared = ~trees.prompt_skips[rows].any(axis=1)
    prompts = own_prompt_lengths(trees, rows).sum(axis=1)
    return np.where(is_shared, trees.prompt_lengths[rows], prompts) + completions


def row_tokens(tier: str, trees: TreeSource) -> np.ndarray:
    """(n,) tokens of the model that each row takes by itself."""
    rows = np.arange(len(trees))
    if tier == SHARED:
        return tree_sizes(trees, rows)
    lengths_nm = sequence_lengths(trees, rows)
    if tier == PACKED:
        return lengths_nm.sum(axis=1)
    return lengths_nm.shape[1] * lengths_nm.max(axis=1)


def bins_of_groups(
    tier: str, trees: TreeSource, rows: np.ndarray, starts: np.ndarray, budget: int
) -> list[list[int]]:
    """Groups of rows, which begin at `starts`, in bins of at most `budget` tokens of the model,
    padding among them. A group over the budget has a bin of its own."""
    if tier == SHARED:
        sizes = np.add.reduceat(tree_sizes(trees, rows), starts)
        return balanced_bins(sizes.tolist(), budget)
    lengths_Bm = sequence_lengths(trees, rows)
    if tier == PACKED:
        sizes = np.add.reduceat(lengths_Bm.sum(axis=1), starts)
        return balanced_bins(sizes.tolist(), budget)
    longest = np.maximum.reduceat(lengths_Bm.max(axis=1), starts)
    counts = np.add.reduceat(np.full(len(rows), lengths_Bm.shape[1]), starts)
    return padded_bins(counts.tolist(), longest.tolist(), budget)


def padded_bins(counts: list[int], longest: list[int], budget: int) -> list[list[int]]:
    """Groups of `counts` sequences of at most `longest` tokens, in bins whose sequences times their
    longest are at most `budget`. Neighbours in length share a bin."""
    bins: list[list[int]] = []
    width = held = 0
    for group in sorted(range(len(counts)), key=lambda i: (-longest[i], i)):
        if not bins or (held + counts[group]) * width > budget:
            bins.append([])
            width, held = longest[group], 0
        bins[-1].append(group)
        held += counts[group]
    return sorted(sorted(members) for members in bins)


def model_tokens(tier: str, lengths: Sequence[int]) -> int:
    """Tokens that a model is given for the sequences of a bin, padding among them."""
    return len(lengths) * max(lengths) if tier == PADDED else sum(lengths)
