"""The columns of token ids that a data set is encoded to: written by `Encoder`, read by `TreeSet`.

`ids` of a row is its prompt followed by its m completions; a row that is not trained on has none,
and its `status` says why. The columns lie in an Arrow file that is memory-mapped and cached between
runs, or in memory; only lengths, weights and labels are read into memory.

Legend: n rows after dropping, m completions of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import Tree
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
COLUMN_TYPES = {
    "prompt_length": "int32",
    "weight": "float32",
    "status": "int8",
    "flags": "int8",
    "digest": "int64",
    "largest_id": "int32",
    "label": "bool",
}
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

    @property
    def lengths(self) -> list[str]:
        """The columns that hold the lengths of the completions."""
        return [f"completion_length_{i}" for i in range(self.sides)]

    @property
    def columns(self) -> list[str]:
        of_rows = ["weight", "status", "flags", "digest", "largest_id"]
        label = ["label"] if self.row_format.has_label else []
        return ["ids", "prompt_length", *self.lengths, *of_rows, *label]

    def features(self) -> Any:
        """The columns as `datasets` wants them described."""
        from datasets import Features, List, Value

        types = {name: Value(COLUMN_TYPES.get(name, "int32")) for name in self.columns}
        return Features({**types, "ids": List(Value("int32"))})

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        batch = _decoded(batch, rows, self.row_format.columns)
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        columns["weight"] = list(read_weights(batch, rows, self.weight_column))
        if self.row_format.has_label:
            columns["label"] = list(read_labels(batch, rows))
        encoded = self._encode(batch, rows)
        for row, weight in zip(encoded, columns["weight"], strict=True):
            for name, value in self._row(row, weight).items():
                columns[name].append(value)
        return columns

    def _encode(
        self, batch: Mapping[str, list[Any]], rows: Sequence[int]
    ) -> list[Encoded | Skipped]:
        if self.row_format.is_tokenised:
            return list(read_ids_batch(batch, rows, self.row_format, self.vocabulary_size))
        examples = read_batch(batch, rows, self.row_format)
        wanted = [example for example in examples if isinstance(example, Example)]
        encoded = iter(encode(self.tokenizer, wanted))
        return [example if isinstance(example, Skipped) else next(encoded) for example in examples]

    def _row(self, encoded: Encoded | Skipped, weight: float) -> dict[str, Any]:
        """The columns of one row but for its weight and label."""
        status, row = self._finish(encoded)
        if not np.isfinite(weight):
            status = Status.WEIGHT_NOT_FINITE
        flags = 0
        parts = [_NO_IDS] * (1 + self.sides)
        if row is not None and row.mismatch:
            flags |= MISMATCH
        if row is not None and status == Status.KEPT:
            parts = [row.prompt_ids, *row.completions]
            if row.truncated:
                flags |= TRUNCATED
        ids = np.concatenate(parts)
        lengths = [len(part) for part in parts]
        return {
            "ids": ids,
            "prompt_length": lengths[0],
            **dict(zip(self.lengths, lengths[1:], strict=True)),
            "status": int(status),
            "flags": flags,
            "digest": _digest(ids, lengths),
            "largest_id": int(ids.max(initial=0)),
        }

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


class Columns(NamedTuple):
    """Encoded columns as arrays."""

    numbers: dict[str, np.ndarray]  # by name, each (rows as read,)
    offsets: list[np.ndarray]  # of each chunk of ids: (rows + 1,)
    values: list[np.ndarray]  # of each chunk: all its ids

    @classmethod
    def of_dataset(cls, encoded: Any) -> Columns:
        """Views of the memory-mapped file of a `datasets.Dataset`."""
        table = encoded.data
        names = [name for name in table.column_names if name != "ids"]
        chunks = [chunk for chunk in table.column("ids").chunks if len(chunk)]
        return cls(
            {name: table.column(name).to_numpy() for name in names},
            [chunk.offsets.to_numpy() for chunk in chunks],
            [chunk.values.to_numpy() for chunk in chunks],
        )

    @classmethod
    def of_lists(cls, columns: Mapping[str, list[Any]]) -> Columns:
        """What an `Encoder` returned, in memory."""
        ids = columns["ids"]
        numbers = {
            name: np.array(values, dtype=COLUMN_TYPES.get(name, "int32"))
            for name, values in columns.items()
            if name != "ids"
        }
        offsets = np.concatenate(([0], np.cumsum([len(row) for row in ids])))
        return cls(numbers, [offsets], [np.concatenate([_NO_IDS, *ids])])


@dataclass(frozen=True)
class DataReport:
    """What was read, dropped and counted; `str()` is what a run prints at its start."""

    name: str
    split: str
    rows: int  # as read
    kept: int
    truncated: int  # kept rows with a side cut at max_length
    boundary_mismatches: int  # rows whose prompt ids are not a prefix of every side's ids
    max_length: int | None
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> rows

    @classmethod
    def of(cls, columns: Columns, name: str, split: str, max_length: int | None) -> DataReport:
        status, flags = columns.numbers["status"], columns.numbers["flags"]
        counts = np.bincount(status, minlength=len(Status))
        reasons = [one for one in Status if one is not Status.KEPT and counts[one]]
        return cls(
            name=name,
            split=split,
            rows=len(status),
            kept=int(counts[Status.KEPT]),
            truncated=int(np.count_nonzero(flags & TRUNCATED)),
            boundary_mismatches=int(np.count_nonzero(flags & MISMATCH)),
            max_length=max_length,
            dropped={one.reason: int(counts[one]) for one in reasons},
        )

    def lines(self) -> list[str]:
        lines = [f"read {self.rows} rows of {self.name} ({self.split}), kept {self.kept}"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.items()]
        if self.truncated:
            lines.append(
                f"  cut {self.truncated} at max_length {self.max_length}: their last tokens, EOS "
                "included"
            )
        if self.boundary_mismatches:
            share = self.boundary_mismatches / self.rows
            lines.append(
                f"  boundary: in {self.boundary_mismatches} ({share:.1%}) the prompt's own tokens "
                "are not how the whole text begins; their completion starts where the two part"
            )
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


class TreeSet:
    """Tokenised rows with random access, a TreeSource. Row numbers are positions after dropping.

    Arrays of the trees it gives are read-only views of the columns.
    """

    prompt_lengths: np.ndarray  # (n,) int32
    completion_lengths: np.ndarray  # (n, m) int32
    weights: np.ndarray  # (n,) float32
    labels: np.ndarray | None  # (n,) bool, of unpaired rows that have them
    positions: np.ndarray  # (n,) place of each row in the data set as it was read
    largest_id: int  # of all tokens
    fingerprint: str  # of tokens, order, weights, labels and options; not of paths or times
    report: DataReport

    def __init__(self, columns: Columns, report: DataReport, options: Mapping[str, Any]) -> None:
        numbers = columns.numbers
        kept = np.flatnonzero(numbers["status"] == Status.KEPT)
        sides = [name for name in numbers if name.startswith("completion_length")]
        self.prompt_lengths = numbers["prompt_length"][kept]
        self.completion_lengths = np.stack([numbers[name][kept] for name in sides], axis=1)
        self.weights = numbers["weight"][kept]
        self.labels = numbers["label"][kept].astype(bool) if "label" in numbers else None
        self.positions = kept
        self.largest_id = int(numbers["largest_id"][kept].max(initial=0))
        self.report = report
        self._columns = columns
        starts = np.cumsum([0] + [len(offsets) - 1 for offsets in columns.offsets])
        self._chunk = np.searchsorted(starts, kept, side="right") - 1
        self._within = kept - starts[self._chunk]
        self.fingerprint = self._fingerprint(options)

    def _fingerprint(self, options: Mapping[str, Any]) -> str:
        described = json.dumps(dict(options), sort_keys=True).encode()
        digest = hashlib.blake2b(described, digest_size=16)
        content = self._columns.numbers["digest"][self.positions]
        for array in (content, self.weights, self.labels):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> Tree:
        if not 0 <= row < len(self.prompt_lengths):
            raise IndexError(f"row {row} of {len(self)}")
        chunk, within = self._chunk[row], self._within[row]
        start = int(self._columns.offsets[chunk][within])
        values = self._columns.values[chunk]
        end = start + int(self.prompt_lengths[row])
        prompt_ids = values[start:end]
        completions = []
        for length in self.completion_lengths[row].tolist():
            completions.append(values[end : end + length])
            end += length
        return Tree(int(row), prompt_ids, tuple(completions), float(self.weights[row]))

    def __iter__(self) -> Iterator[Tree]:
        return (self[row] for row in range(len(self)))


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
