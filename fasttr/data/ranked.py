"""Rows of ranked completions, as a reward model is trained on: pairs, or m completions, best first.

The tokens are those of `fasttr.data.load`, uncut: TRL's, prompt and side as one text. Two things
are TRL's RewardTrainer's: a row with a side above `max_length` is dropped, and a column `margin` is
the margin of its row. The prompt that a tree's completions share is the row's own where it has
one, so that all rows of a prompt share it; otherwise it is what the token ids have in common.

Legend: n rows that are kept, m completions of a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fasttr.batch import Tree, TreeSource
from fasttr.data.arrow import TreeSet
from fasttr.data.load import DataConfig, encode_rows
from fasttr.data.tokens import RowError, common_prefix_length
from fasttr.errors import FasttrError

MARGIN = "margin"
RANKED = "completions"


class RankedTrees:
    """A TreeSource over some rows of another one, with their prompts' ends moved and margins.

    Args:
        members: (n, m) for each tree the rows of `source` and, from 0, the completion of each.
        source: trees whose completions are taken.
        has_prompt: whether the source's prompts are the rows' own.
        margin: (n,) of pairs, or None.
    """

    labels: np.ndarray | None = None
    prompt_skips: np.ndarray | None = None

    def __init__(
        self,
        source: TreeSource,
        members: np.ndarray,
        sides: np.ndarray,
        *,
        has_prompt: bool,
        margin: np.ndarray | None,
        positions: np.ndarray,
    ):
        self.source = source
        self.members = members  # (n, m)
        self.sides = sides  # (n, m)
        self.margin = margin
        self.positions = positions
        self._shift = self._shifts(has_prompt)  # (n,) tokens that go from completions to the prompt
        self.largest_id = source.largest_id
        own = source.completion_lengths[members, sides]
        self.prompt_lengths = (source.prompt_lengths[members[:, 0]] + self._shift).astype(np.int32)
        self.completion_lengths = (own - self._shift[:, None]).astype(np.int32)
        self.fingerprint = self._fingerprint(has_prompt)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> Tree:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        wholes = self._wholes(row)
        end = int(self.prompt_lengths[row])
        per_completion = {}
        if self.margin is not None:
            m = len(wholes)
            per_completion[MARGIN] = np.full(m, self.margin[row], dtype=np.float32)
        return Tree(
            row=int(row),
            prompt_ids=wholes[0][:end],
            completions=tuple(ids[end:] for ids in wholes),
            weight=self.source[int(self.members[row, 0])].weight,
            per_completion=per_completion,
        )

    def __iter__(self) -> Iterator[Tree]:
        return (self[row] for row in range(len(self)))

    def select(self, rows: np.ndarray) -> RankedTrees:
        """Some rows, in a given order."""
        picked = object.__new__(RankedTrees)
        picked.source, picked.largest_id = self.source, self.source.largest_id
        picked.members, picked.sides = self.members[rows], self.sides[rows]
        picked.margin = None if self.margin is None else self.margin[rows]
        picked.positions = self.positions[rows]
        picked._shift = self._shift[rows]
        picked.prompt_lengths = self.prompt_lengths[rows]
        picked.completion_lengths = self.completion_lengths[rows]
        digest = hashlib.blake2b(rows.astype(np.int64).tobytes(), digest_size=16).hexdigest()
        picked.fingerprint = f"{self.fingerprint}/{digest}"
        return picked

    def _wholes(self, row: int) -> list[np.ndarray]:
        """Prompt and completion of each member as one array."""
        found = []
        pairs = zip(self.members[row].tolist(), self.sides[row].tolist(), strict=True)
        for member, side in pairs:
            tree = self.source[member]
            found.append(np.concatenate([tree.prompt_ids, tree.completions[side]]))
        return found

    def _shifts(self, has_prompt: bool) -> np.ndarray:
        """By how much the shared prompt of each row is longer than the source's.

        At least one token is left to every completion.
        """
        shifts = np.zeros(len(self), dtype=np.int64)
        for row in range(len(self)):
            wholes = self._wholes(row)
            shortest = min(map(len, wholes)) - 1
            start = int(self.source.prompt_lengths[self.members[row, 0]])
            shared = min(common_prefix_length(wholes[0], ids) for ids in wholes[1:])
            end = min(start, shared) if has_prompt else shared
            shifts[row] = min(end, shortest) - start
        return shifts

    def _fingerprint(self, has_prompt: bool) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.source.fingerprint}/{has_prompt}".encode())
        for array in (self.members, self.sides, self.margin):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def encode_ranked(tokenizer: Any, rows: Any, config: DataConfig) -> tuple[RankedTrees, list[str]]:
    """The rows as trees, and the lines that say what was read and dropped.

    `rows`: a `datasets.Dataset` or a list of mappings, with chosen and rejected, or with
    completions (a list, best first). FasttrError when nothing is left, or on a row that cannot be
    read.
    """
    names = _column_names(rows)
    whole = dataclasses.replace(config, max_length=None, sides=2)
    has_prompt = "prompt" in names or "prompt_ids" in names
    is_ranked = RANKED in names and "chosen" not in names
    if is_ranked:
        rows, m = _one_a_completion(rows, config)
        source = encode_rows(tokenizer, rows, whole)
        members, positions = _groups(source, m)
        sides = np.zeros_like(members)
    else:
        source = encode_rows(tokenizer, rows, whole)
        members = np.repeat(np.arange(len(source))[:, None], 2, axis=1)
        sides = np.tile(np.array([0, 1]), (len(source), 1))
        positions = source.positions
    lines = source.report.lines()
    members, sides, positions, too_long = _short_enough(
        source, members, sides, positions, config.max_length
    )
    if too_long:
        lines.append(
            f"  dropped {too_long}: a side is longer than max_length {config.max_length}, as TRL "
            "drops it"
        )
    if len(members) == 0:
        raise FasttrError(f"{config.place}: no row is left that fits max_length")
    margin = None
    if MARGIN in names:
        margin = _margins(rows, positions, config) if not is_ranked else _refuse_margin(config)
    trees = RankedTrees(
        source, members, sides, has_prompt=has_prompt, margin=margin, positions=positions
    )
    return trees, lines


def _column_names(rows: Any) -> list[str]:
    if hasattr(rows, "column_names"):
        return list(rows.column_names)
    if isinstance(rows, Sequence) and rows and isinstance(rows[0], dict):
        return list(rows[0])
    return []


def _one_a_completion(rows: Any, config: DataConfig) -> tuple[list[dict[str, Any]], int]:
    """Each completion as a row of its own, in order, and how many a row has."""
    taken = [name for name in _column_names(rows) if name != RANKED]
    out: list[dict[str, Any]] = []
    m = None
    for number, row in enumerate(rows):
        ranked = row[RANKED]
        if not isinstance(ranked, list) or len(ranked) < 2:
            error = RowError(number, f"{RANKED} is {ranked!r:.40}; wanted a list, best first")
            raise FasttrError(f"{config.place}: {error}")
        m = len(ranked) if m is None else m
        if len(ranked) != m:
            error = RowError(number, f"{RANKED} has {len(ranked)} entries; wanted {m}, as row 0")
            raise FasttrError(f"{config.place}: {error}")
        same = {name: row[name] for name in taken}
        out += [{**same, "completion": one, "label": True} for one in ranked]
    if m is None:
        raise FasttrError(f"{config.place}: holds no rows")
    return out, m


def _groups(source: TreeSet, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, m) rows of `source` that belong together, and (n,) the row they came from; rows that lack
    a completion are left out."""
    origin, first, count = np.unique(source.positions // m, return_index=True, return_counts=True)
    whole = count == m
    return first[whole, None] + np.arange(m), origin[whole]


def _short_enough(
    source: TreeSource,
    members: np.ndarray,
    sides: np.ndarray,
    positions: np.ndarray,
    max_length: int | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    if max_length is None:
        return members, sides, positions, 0
    own = source.completion_lengths[members, sides] + source.prompt_lengths[members]
    fits = (own <= max_length).all(axis=1)
    return members[fits], sides[fits], positions[fits], int((~fits).sum())


def _margins(rows: Any, positions: np.ndarray, config: DataConfig) -> np.ndarray:
    column = rows[MARGIN] if hasattr(rows, "column_names") else [row[MARGIN] for row in rows]
    values = []
    for row in positions.tolist():
        value = column[row]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not np.isfinite(value):
            error = RowError(row, f"{MARGIN} is {value!r:.40}; wanted a number")
            raise FasttrError(f"{config.place}: {error}")
        values.append(value)
    return np.array(values, dtype=np.float32)


def _refuse_margin(config: DataConfig) -> np.ndarray:
    raise FasttrError(
        f"{config.place}: has margin beside completions; a margin is of a pair: leave it out"
    )
