"""Columns of token ids: written by `fasttr.data.encoder.Encoder`, read as trees by `TreeSet`.

They lie in an Arrow file that is memory-mapped and cached between runs, or in memory; only lengths,
weights and labels are read into memory.

Legend: n rows after dropping, m completions of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import Tree
from fasttr.data.formats import Status
from fasttr.data.tokens import NO_IDS

# Bits of the flags column.
TRUNCATED, MISMATCH, PROMPT_CUT, IDENTICAL, ODD_ROLE = 1, 2, 4, 8, 16
COLUMN_TYPES = {
    "prompt_length": "int32",
    "weight": "float32",
    "status": "int8",
    "flags": "int8",
    "digest": "int64",
    "largest_id": "int32",
    "label": "bool",
    "read_row": "int64",
}


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
        return cls(numbers, [offsets], [np.concatenate([NO_IDS, *ids])])


class TreeSet:
    """Tokenised rows with random access, a TreeSource. Row numbers are positions after dropping.

    Arrays of the trees it gives are read-only views of the columns.
    """

    prompt_lengths: np.ndarray  # (n,) int32
    completion_lengths: np.ndarray  # (n, m) int32
    prompt_skips: np.ndarray | None  # (n, m) int32, tokens of the prompt that a completion lacks
    weights: np.ndarray  # (n,) float32
    labels: np.ndarray | None  # (n,) bool, of unpaired rows that have them
    uncut_lengths: np.ndarray | None  # (n,) int32, of rows with labels: what `uncut` gives
    positions: np.ndarray  # (n,) place of each row in the data set as it was read
    largest_id: int  # of all tokens
    fingerprint: str  # of tokens, order, weights, labels and options; not of paths or times
    report: Any  # the DataReport, what was read and dropped

    def __init__(
        self,
        columns: Columns,
        report: Any,
        options: Mapping[str, Any],
        most: int | None = None,
    ) -> None:
        """`most`: rows beyond so many kept ones are left out."""
        numbers = columns.numbers
        kept = np.flatnonzero(numbers["status"] == Status.KEPT)[:most]
        self._kept = kept
        self._columns = columns
        self.prompt_lengths = numbers["prompt_length"][kept]
        self.completion_lengths = self._by_side("completion_length")
        has_skips = "prompt_skip_0" in numbers
        self.prompt_skips = self._by_side("prompt_skip") if has_skips else None
        self.weights = numbers["weight"][kept]
        self.labels = numbers["label"][kept].astype(bool) if "label" in numbers else None
        self.uncut_lengths = numbers["stored_length"][kept] if "stored_length" in numbers else None
        self.positions = numbers["read_row"][kept] if "read_row" in numbers else kept
        self.largest_id = int(numbers["largest_id"][kept].max(initial=0))
        self.report = report
        starts = np.cumsum([0] + [len(offsets) - 1 for offsets in columns.offsets])
        self._chunk = np.searchsorted(starts, kept, side="right") - 1
        self._within = kept - starts[self._chunk]
        self.fingerprint = self._fingerprint(options)

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> Tree:
        start, values = self._place(row)
        end = start + int(self.prompt_lengths[row])
        prompt_ids = values[start:end]
        completions = []
        for length in self.completion_lengths[row].tolist():
            completions.append(values[end : end + length])
            end += length
        return Tree(
            row=int(row),
            prompt_ids=prompt_ids,
            completions=tuple(completions),
            weight=float(self.weights[row]),
            prompt_skips=self._skips(row),
        )

    def __iter__(self) -> Iterator[Tree]:
        return (self[row] for row in range(len(self)))

    def uncut(self, row: int) -> np.ndarray:
        """(uncut_lengths[row],) the completion of a row with a label, not cut beside its prompt."""
        assert self.uncut_lengths is not None
        start, values = self._place(row)
        start += int(self.prompt_lengths[row])
        return values[start : start + int(self.uncut_lengths[row])]

    def _place(self, row: int) -> tuple[int, np.ndarray]:
        """Where a row's ids begin, and in which array."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        chunk, within = self._chunk[row], self._within[row]
        return int(self._columns.offsets[chunk][within]), self._columns.values[chunk]

    def _skips(self, row: int) -> tuple[int, ...] | None:
        if self.prompt_skips is None or not self.prompt_skips[row].any():
            return None
        return tuple(self.prompt_skips[row].tolist())

    def _by_side(self, name: str) -> np.ndarray:
        numbers = self._columns.numbers
        sides = [key for key in numbers if key.startswith(f"{name}_")]
        return np.stack([numbers[key][self._kept] for key in sides], axis=1)

    def _fingerprint(self, options: Mapping[str, Any]) -> str:
        described = json.dumps(dict(options), sort_keys=True).encode()
        digest = hashlib.blake2b(described, digest_size=16)
        content = self._columns.numbers["digest"][self._kept]
        for array in (content, self.weights, self.labels):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
