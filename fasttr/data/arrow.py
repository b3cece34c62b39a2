"""Batches of rows to columns of token ids, with the reason for every row that is not trained on.

The columns are what a tokenising run caches: `ids` is the prompt followed by its m completions; a
dropped row has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fasttr.data.formats import (
    RowFormat,
    Skipped,
    Status,
    read_batch,
    read_ids_batch,
    read_labels,
    read_weights,
)
from fasttr.data.tokens import Encoded, Example, cut, encode, vocabulary_size
from fasttr.errors import FasttrError

TRUNCATED, MISMATCH = 1, 2  # bits of the flags column
_NO_IDS = np.empty(0, dtype=np.int32)


class Encoder:
    """Batches of rows to columns of token ids; what `map` runs, here or in its processes."""

    def __init__(
        self,
        tokenizer: Any,
        row_format: RowFormat,
        *,
        max_length: int | None,
        sides: int,
        weight_column: str | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.row_format = row_format
        self.max_length = max_length
        self.weight_column = weight_column
        self.sides = min(sides, len(row_format.completions))
        self.vocabulary_size = vocabulary_size(tokenizer)

    def features(self) -> Any:
        from datasets import Features, List, Value

        columns = {"ids": List(Value("int32")), "prompt_length": Value("int32")}
        columns |= {f"completion_length_{i}": Value("int32") for i in range(self.sides)}
        columns |= {
            name: Value(kind)
            for name, kind in (("weight", "float32"), ("status", "int8"), ("flags", "int8"))
        }
        columns["digest"] = Value("int64")
        if self.row_format.has_label:
            columns["label"] = Value("bool")
        return Features(columns)

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        batch = _decoded(batch, rows, self.row_format.columns)
        weights = read_weights(batch, rows, self.weight_column)
        columns: dict[str, list[Any]] = {name: [] for name in self.features()}
        for encoded, weight in zip(self._encode(batch, rows), weights, strict=True):
            status, row = self._finish(encoded)
            if not np.isfinite(weight):
                status = Status.WEIGHT_NOT_FINITE
            parts = [_NO_IDS] * (1 + self.sides)
            flags = 0
            if row is not None:
                flags |= MISMATCH * row.mismatch
                if status == Status.KEPT:
                    flags |= TRUNCATED * row.truncated
                    parts = [row.prompt_ids, *row.completions]
            ids = np.concatenate(parts)
            lengths = [len(part) for part in parts]
            content = np.array(lengths, dtype=np.int64).tobytes() + ids.tobytes()
            columns["ids"].append(ids)
            columns["prompt_length"].append(lengths[0])
            for i, length in enumerate(lengths[1:]):
                columns[f"completion_length_{i}"].append(length)
            columns["status"].append(int(status))
            columns["flags"].append(flags)
            digest = hashlib.blake2b(content, digest_size=8).digest()
            columns["digest"].append(int.from_bytes(digest, "little", signed=True))
        columns["weight"] = list(weights)
        if self.row_format.has_label:
            columns["label"] = list(read_labels(batch, rows))
        return columns

    def _encode(
        self, batch: Mapping[str, list[Any]], rows: Sequence[int]
    ) -> list[Encoded | Skipped]:
        if self.row_format.is_tokenised:
            return list(read_ids_batch(batch, rows, self.row_format, self.vocabulary_size))
        examples = read_batch(batch, rows, self.row_format)
        encoded = iter(
            encode(
                self.tokenizer, [example for example in examples if isinstance(example, Example)]
            )
        )
        return [example if isinstance(example, Skipped) else next(encoded) for example in examples]

    def _finish(self, row: Encoded | Skipped) -> tuple[Status, Encoded | None]:
        """Drop or cut one row."""
        if isinstance(row, Skipped):
            return row.status, None
        if self.max_length is not None and len(row.prompt_ids) >= self.max_length:
            return Status.PROMPT_TOO_LONG, row
        row = cut(row._replace(completions=row.completions[: self.sides]), self.max_length)
        if any(len(ids) == 0 for ids in row.completions):
            return Status.EMPTY_COMPLETION, row
        if self.sides == 2 and np.array_equal(row.completions[0], row.completions[1]):
            return Status.IDENTICAL_SIDES, row
        return Status.KEPT, row


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
