"""A data set to tokenised trees: read, encode, drop what cannot be trained on, report, and give
random access.

Tokens live in an Arrow file that is memory-mapped and cached between runs; only lengths, weights
and labels are read into memory.

Legend: n rows after dropping, m completions of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fasttr.batch import Tree
from fasttr.data.arrow import MISMATCH, TRUNCATED, Encoder
from fasttr.data.formats import DATASET_FORMATS, Status, find_format
from fasttr.data.sources import check_features, read_rows
from fasttr.data.tokens import require_eos, tokenizer_fingerprint
from fasttr.errors import FasttrError

# Part of every cache key: raise it when the same rows and options would give other tokens.
ENCODING_VERSION = 1


@dataclass(frozen=True)
class DataConfig:
    """Which rows to read and how to encode them. FasttrError on a value out of range."""

    name: str  # hub id, folder, or .json, .jsonl, .parquet file (.gz too)
    config: str | None = None  # configuration of a hub data set
    split: str = "train"  # a single file has the split train alone
    dataset_format: str | None = None  # None: by columns; hh_rlhf: raw transcripts
    max_length: int | None = 1024  # prompt + completion, a side; None: no cut
    weight_column: str | None = None
    sides: int = 2  # 1: keep the chosen side of a pair alone, once both are encoded
    max_dropped_fraction: float = 1.0
    max_boundary_mismatch: float | None = None  # fraction of rows
    num_proc: int | None = None
    cache_dir: str | None = None  # None: the cache of `datasets`

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise FasttrError(
                "the name of the data set is empty: give a file, a folder or a hub id"
            )
        if self.dataset_format is not None and self.dataset_format not in DATASET_FORMATS:
            raise FasttrError(
                f"dataset_format {self.dataset_format!r} is unknown: use "
                f"{', '.join(DATASET_FORMATS)}, or leave it out"
            )
        if self.max_length is not None and self.max_length < 2:
            raise FasttrError(
                f"max_length is {self.max_length}; wanted at least 2 (prompt and completion), or "
                "none"
            )
        if self.sides not in (1, 2):
            raise FasttrError(
                f"sides is {self.sides}; wanted 2 (pairs) or 1 (the chosen side alone)"
            )
        if self.num_proc is not None and self.num_proc < 1:
            raise FasttrError(f"num_proc is {self.num_proc}; wanted at least 1, or none")
        for key in ("max_dropped_fraction", "max_boundary_mismatch"):
            value = getattr(self, key)
            if value is not None and not 0.0 <= value <= 1.0:
                raise FasttrError(f"{key} is {value}; wanted a fraction in [0, 1]")


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

    def lines(self) -> list[str]:
        lines = [f"read {self.rows} rows of {self.name} ({self.split}), kept {self.kept}"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.items()]
        if self.truncated:
            lines.append(
                f"  cut {self.truncated} at max_length {self.max_length}: their last tokens, EOS "
                "included"
            )
        if self.boundary_mismatches:
            lines.append(
                f"  boundary: in {self.boundary_mismatches} "
                f"({self.boundary_mismatches / self.rows:.1%}) the prompt's "
                "own tokens are not how the whole text begins; their completion starts where the "
                "two part"
            )
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


class TreeSet:
    """Tokenised rows with random access, a TreeSource. Row numbers are positions after dropping.

    Arrays of the trees it gives are read-only views of the memory-mapped file.
    """

    prompt_lengths: np.ndarray  # (n,) int32
    completion_lengths: np.ndarray  # (n, m) int32
    weights: np.ndarray  # (n,) float32
    labels: np.ndarray | None  # (n,) bool, of unpaired rows that have them
    fingerprint: (
        str  # a digest of tokens, order, weights, labels and options; not of paths or times
    )
    report: DataReport

    def __init__(self, encoded: Any, report: DataReport, options: Mapping[str, Any]) -> None:
        table = encoded.data
        column = {
            name: table.column(name).to_numpy() for name in table.column_names if name != "ids"
        }
        kept = np.flatnonzero(column["status"] == Status.KEPT)
        sides = [name for name in table.column_names if name.startswith("completion_length")]
        self.prompt_lengths = column["prompt_length"][kept]
        self.completion_lengths = np.stack([column[name][kept] for name in sides], axis=1)
        self.weights = column["weight"][kept]
        self.labels = column["label"][kept].astype(bool) if "label" in column else None
        self.report = report
        chunks = [chunk for chunk in table.column("ids").chunks if len(chunk)]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        starts = np.cumsum([0] + [len(chunk) for chunk in chunks])
        self._chunk = np.searchsorted(starts, kept, side="right") - 1
        self._within = kept - starts[self._chunk]
        digest = hashlib.blake2b(json.dumps(dict(options), sort_keys=True).encode(), digest_size=16)
        for array in (column["digest"][kept], self.weights, self.labels):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> Tree:
        if not 0 <= row < len(self.prompt_lengths):
            raise IndexError(f"row {row} of {len(self)}")
        chunk, within = self._chunk[row], self._within[row]
        start = int(self._offsets[chunk][within])
        values = self._values[chunk]
        end = start + int(self.prompt_lengths[row])
        prompt_ids = values[start:end]
        completions = []
        for length in self.completion_lengths[row].tolist():
            completions.append(values[end : end + length])
            end += length
        return Tree(int(row), prompt_ids, tuple(completions), float(self.weights[row]))

    def __iter__(self) -> Iterator[Tree]:
        return (self[row] for row in range(len(self)))


def load_trees(tokenizer: Any, config: DataConfig) -> TreeSet:
    """Read, tokenise (once; cached after that) and index one split.

    Raises FasttrError, one line, on whatever cannot be read or encoded, when no row is left, and
    above `max_dropped_fraction` or `max_boundary_mismatch`.
    """
    rows = read_rows(
        config.name, config=config.config, split=config.split, cache_dir=config.cache_dir
    )
    return encode_rows(tokenizer, rows, config)


def encode_rows(tokenizer: Any, rows: Any, config: DataConfig) -> TreeSet:
    """`load_trees` for a `datasets.Dataset` that is already here (a mixture, a split of one's
    own)."""
    require_eos(tokenizer)
    try:
        row_format = find_format(
            rows.column_names,
            dataset_format=config.dataset_format,
            weight_column=config.weight_column,
            sides=config.sides,
        )
    except FasttrError as error:
        raise FasttrError(f"{config.name} ({config.split}): {error}") from None
    check_features(config.name, rows.features, row_format.columns)
    options = {
        "version": ENCODING_VERSION,
        "max_length": config.max_length,
        "sides": config.sides,
        "weight_column": config.weight_column,
        "format": asdict(row_format),
    }
    key = json.dumps([rows._fingerprint, tokenizer_fingerprint(tokenizer), options], sort_keys=True)
    encoder = Encoder(
        tokenizer,
        row_format,
        max_length=config.max_length,
        sides=config.sides,
        weight_column=config.weight_column,
    )
    try:
        encoded = (
            rows.with_format(None)
            .select_columns(list(row_format.columns))
            .map(
                encoder,
                batched=True,
                with_indices=True,
                remove_columns=list(row_format.columns),
                features=encoder.features(),
                num_proc=config.num_proc,
                new_fingerprint=hashlib.blake2b(key.encode(), digest_size=16).hexdigest(),
                desc=f"Tokenizing {config.split}",
            )
        )
    except FasttrError as error:
        raise FasttrError(f"{config.name} ({config.split}): {error}") from error
    except OSError as error:
        raise FasttrError(
            f"{config.name} ({config.split}): the tokens cannot be written to the cache ({error}): "
            "free space there, or name another cache_dir"
        ) from error
    report = _report(encoded, config)
    _check(report, config)
    return TreeSet(encoded, report, options)


def _report(encoded: Any, config: DataConfig) -> DataReport:
    status = encoded.data.column("status").to_numpy()
    flags = encoded.data.column("flags").to_numpy()
    counts = np.bincount(status, minlength=len(Status))
    return DataReport(
        name=config.name,
        split=config.split,
        rows=len(status),
        kept=int(counts[Status.KEPT]),
        truncated=int(np.count_nonzero(flags & TRUNCATED)),
        boundary_mismatches=int(np.count_nonzero(flags & MISMATCH)),
        max_length=config.max_length,
        dropped={s.reason: int(counts[s]) for s in Status if s is not Status.KEPT and counts[s]},
    )


def _check(report: DataReport, config: DataConfig) -> None:
    where = f"{report.name} ({report.split})"
    reasons = "; ".join(f"{count}: {reason}" for reason, count in report.dropped.items())
    dropped = report.rows - report.kept
    if report.kept == 0:
        raise FasttrError(f"{where}: none of {report.rows} rows can be trained on ({reasons})")
    if dropped > config.max_dropped_fraction * report.rows:
        raise FasttrError(
            f"{where}: {dropped} of {report.rows} rows dropped ({reasons}), above "
            "max_dropped_fraction "
            f"{config.max_dropped_fraction}: mend the rows or raise it"
        )
    limit = config.max_boundary_mismatch
    if limit is not None and report.boundary_mismatches > limit * report.rows:
        raise FasttrError(
            f"{where}: in {report.boundary_mismatches} of {report.rows} rows the prompt's tokens "
            "are not how the whole "
            f"text begins, above max_boundary_mismatch {limit}: end prompts on a token boundary, "
            "or raise it"
        )
