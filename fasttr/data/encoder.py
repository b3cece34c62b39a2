"""Batches of rows to columns of token ids.

`ids` of a row is its prompt followed by its m completions; a row that is not trained on has none,
and its `status` says why.

Legend: m completions of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasttr.data.arrow import (
    COLUMN_TYPES,
    IDENTICAL,
    MISMATCH,
    ODD_ROLE,
    PROMPT_CUT,
    TRUNCATED,
)
from fasttr.data.formats import RowFormat, Skipped, Status
from fasttr.data.reading import (
    read_batch,
    read_ids_batch,
    read_labels,
    read_weights,
    unknown_role,
)
from fasttr.data.tokens import (
    NO_IDS,
    Encoded,
    Example,
    cut,
    cut_left,
    encode,
    shorten,
    vocabulary_size,
)
from fasttr.errors import FasttrError

ReadRow = Example | Encoded | Skipped  # as text or messages, as token ids, or dropped at once


@dataclass(frozen=True)
class Shape:
    """Which completions of a row are kept, and what their tokens are cut to."""

    max_length: int | None = 1024  # prompt + completion, a side; None: no cut
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    keeps_end: bool = False  # cut on the left
    sides: int = 2  # 1: the chosen side of a pair alone, once both are encoded
    takes_pairs_apart: bool = False  # chosen and rejected become rows with a verdict
    drops_identical: bool = True  # pairs whose sides are the same tokens
    weight_column: str | None = None

    def cut(self, row: Encoded) -> Encoded:
        """The row within its lengths; its prompt must leave room, unless the end is kept."""
        return cut_left(row, self.max_length) if self.keeps_end else cut(row, self.max_length)

    def leaves_no_room(self, row: Encoded) -> bool:
        if self.max_length is None or self.keeps_end:
            return False
        return len(row.prompt_ids) >= self.max_length


class Encoder:
    """Batches of rows to columns of token ids; what `map` runs, here or in its processes.

    The completion of a row with a verdict is stored as long as max_length allows beside any prompt,
    since KTO puts it beside another one too; `completion_length_0` is what its own prompt leaves.
    """

    def __init__(self, tokenizer: Any, row_format: RowFormat, shape: Shape) -> None:
        self.tokenizer = tokenizer
        self.row_format = row_format
        self.shape = shape
        self.takes_apart = shape.takes_pairs_apart and len(row_format.completions) == 2
        self.has_label = row_format.has_label or self.takes_apart
        self.sides = 1 if self.takes_apart else min(shape.sides, len(row_format.completions))
        self.vocabulary_size = vocabulary_size(tokenizer)

    @property
    def lengths(self) -> list[str]:
        """The columns that hold the lengths of the completions."""
        return [f"completion_length_{i}" for i in range(self.sides)]

    @property
    def skips(self) -> list[str]:
        """The columns that hold how much of the prompt each completion goes without."""
        return [f"prompt_skip_{i}" for i in range(self.sides)] if self.shape.keeps_end else []

    @property
    def columns(self) -> list[str]:
        names = ["ids", "prompt_length", *self.lengths, *self.skips]
        names += ["weight", "status", "flags", "digest", "largest_id"]
        if self.has_label:
            names += ["label", "stored_length"]
        if self.takes_apart:
            names.append("read_row")
        return names

    def features(self) -> Any:
        """The columns as `datasets` wants them described."""
        from datasets import Features, List, Value

        types = {name: Value(COLUMN_TYPES.get(name, "int32")) for name in self.columns}
        return Features({**types, "ids": List(Value("int32"))})

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        batch = _decoded(batch, rows, self.row_format.columns)
        weights = list(read_weights(batch, rows, self.shape.weight_column))
        read = self._read(batch, rows)
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        if self.takes_apart:
            # In TRL's order: all chosen completions of a batch, then all rejected ones.
            read = [_side(row, 0) for row in read] + [_side(row, 1) for row in read]
            weights = weights * 2
            columns["label"] = [True] * len(rows) + [False] * len(rows)
            columns["read_row"] = [*rows, *rows]
        elif self.has_label:
            columns["label"] = list(read_labels(batch, rows))
        columns["weight"] = weights
        for one, encoded, weight in zip(read, self._encode(read), weights, strict=True):
            for name, value in self._row(one, encoded, weight).items():
                columns[name].append(value)
        return columns

    def _read(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> list[ReadRow]:
        if self.row_format.is_tokenised:
            return [*read_ids_batch(batch, rows, self.row_format, self.vocabulary_size)]
        return [*read_batch(batch, rows, self.row_format)]

    def _encode(self, read: Sequence[ReadRow]) -> list[Encoded | Skipped]:
        wanted = [row for row in read if isinstance(row, Example)]
        encoded = iter(encode(self.tokenizer, wanted))
        return [next(encoded) if isinstance(row, Example) else row for row in read]

    def _row(self, read: ReadRow, encoded: Encoded | Skipped, weight: float) -> dict[str, Any]:
        """The columns of one row but for its weight, its label and its place."""
        if isinstance(encoded, Skipped):
            return self._dropped(encoded.status, 0)
        flags = MISMATCH if encoded.mismatch else 0
        flags |= ODD_ROLE if _has_odd_role(read) else 0
        row = shorten(encoded, self.shape.max_prompt_length, self.shape.max_completion_length)
        flags |= PROMPT_CUT if len(row.prompt_ids) < len(encoded.prompt_ids) else 0
        status, kept = self._finish(row)
        if status == Status.IDENTICAL_SIDES:
            status = _why_identical(read)
            if not self.shape.drops_identical:
                status, flags = Status.KEPT, flags | IDENTICAL
        if not np.isfinite(weight):
            status = Status.WEIGHT_NOT_FINITE
        if status != Status.KEPT:
            return self._dropped(status, flags)
        return self._kept(kept, row, flags | (TRUNCATED if kept.truncated else 0))

    def _finish(self, row: Encoded) -> tuple[Status, Encoded]:
        """Drop or cut one row."""
        if self.shape.leaves_no_room(row):
            return Status.PROMPT_TOO_LONG, row
        row = self.shape.cut(row._replace(completions=row.completions[: self.sides]))
        if any(len(ids) == 0 for ids in row.completions):
            return Status.EMPTY_COMPLETION, row
        if self.sides == 2 and np.array_equal(row.completions[0], row.completions[1]):
            return Status.IDENTICAL_SIDES, row
        return Status.KEPT, row

    def _kept(self, row: Encoded, whole: Encoded, flags: int) -> dict[str, Any]:
        lengths = [len(ids) for ids in row.completions]
        stored = row.completions
        if self.has_label:
            stored = (whole.completions[0][: self.shape.max_length],)
        skips = row.prompt_skips or (0,) * self.sides
        ids = np.concatenate([row.prompt_ids, *stored])
        numbers = [len(row.prompt_ids), *lengths, *skips]
        return {
            "ids": ids,
            "prompt_length": len(row.prompt_ids),
            **dict(zip(self.lengths, lengths, strict=True)),
            **dict(zip(self.skips, skips, strict=False)),
            **({"stored_length": len(stored[0])} if self.has_label else {}),
            "status": int(Status.KEPT),
            "flags": flags,
            "digest": _digest(ids, numbers),
            "largest_id": int(ids.max(initial=0)),
        }

    def _dropped(self, status: Status, flags: int) -> dict[str, Any]:
        zeros = ["prompt_length", *self.lengths, *self.skips, "digest", "largest_id"]
        if self.has_label:
            zeros.append("stored_length")
        return {"ids": NO_IDS, **dict.fromkeys(zeros, 0), "status": int(status), "flags": flags}


def _side(row: ReadRow, side: int) -> ReadRow:
    """One completion of a row with its prompt."""
    if isinstance(row, Skipped):
        return row
    completions = (row.completions[side],)
    return row._replace(completions=completions)  # type: ignore[arg-type]


def _why_identical(read: ReadRow) -> Status:
    """Sides that are the same tokens although they were not the same messages: the template."""
    if not isinstance(read, Example) or isinstance(read.prompt, str):
        return Status.IDENTICAL_SIDES
    differ = read.completions[0] != read.completions[1]
    return Status.TEMPLATE_ALIKE if differ else Status.IDENTICAL_SIDES


def _has_odd_role(read: ReadRow) -> bool:
    return isinstance(read, Example) and unknown_role(read) is not None


def _digest(ids: np.ndarray, lengths: Sequence[int]) -> int:
    content = np.array(lengths, dtype=np.int64).tobytes() + ids.tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _decoded(
    batch: Mapping[str, list[Any]], rows: Sequence[int], names: Sequence[str]
) -> dict[str, list[Any]]:
    """The columns as Python values; JSON and Parquet readers let text through that is not UTF-8."""
    columns = {}
    for name in names:
        try:
            columns[name] = batch[name]
        except UnicodeDecodeError as error:
            raise FasttrError(
                f"{name!r} in rows {rows[0]} to {rows[-1]} is not UTF-8 text: {error}"
            ) from error
    return columns
