"""A data set to tokenised trees: read, encode, drop what cannot be trained on, report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fasttr.data.arrow import Columns, DataReport, Encoder, TreeSet
from fasttr.data.formats import DATASET_FORMATS, RowFormat, find_format
from fasttr.data.sources import check_features, read_rows
from fasttr.data.tokens import require_eos, tokenizer_fingerprint
from fasttr.errors import FasttrError

# Part of every cache key: raise it when the same rows and options would give other tokens.
ENCODING_VERSION = 2
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class DataConfig:
    """Which rows to read and how to encode them. FasttrError on a value out of range."""

    name: str = "the rows"  # hub id, folder, or .json, .jsonl, .parquet file (.gz too)
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

    @property
    def place(self) -> str:
        return f"{self.name} ({self.split})"

    @property
    def options(self) -> dict[str, Any]:
        """What, beside rows, format and tokenizer, decides the tokens."""
        return {
            "version": ENCODING_VERSION,
            "max_length": self.max_length,
            "sides": self.sides,
            "weight_column": self.weight_column,
        }


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
    """`load_trees` for rows that are already here.

    A `datasets.Dataset` is tokenised through its cache, a list of mappings in memory.
    """
    require_eos(tokenizer)
    is_dataset = hasattr(rows, "column_names")
    names = rows.column_names if is_dataset else _column_names(rows, config)
    row_format = _find_format(names, config)
    encoder = Encoder(
        tokenizer,
        row_format,
        max_length=config.max_length,
        sides=config.sides,
        weight_column=config.weight_column,
    )
    options = {**config.options, "format": asdict(row_format)}
    try:
        if is_dataset:
            check_features(config.name, rows.features, row_format.columns)
            columns = _encode_dataset(rows, encoder, options, config)
        else:
            columns = _encode_list(rows, encoder)
    except FasttrError as error:
        raise FasttrError(f"{config.place}: {error}") from error
    report = DataReport.of(columns, config.name, config.split, config.max_length)
    _check(report, config)
    return TreeSet(columns, report, options)


def _column_names(rows: Any, config: DataConfig) -> list[str]:
    is_list = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
    if not is_list or not rows or not all(isinstance(row, Mapping) for row in rows):
        got = f"{type(rows).__name__} of {len(rows)} rows" if is_list else type(rows).__name__
        raise FasttrError(
            f"{config.place}: got {got}; wanted a datasets.Dataset, or a list of dicts with the "
            "columns of a preference set"
        )
    return list(dict.fromkeys(name for row in rows for name in row))


def _find_format(names: Sequence[str], config: DataConfig) -> RowFormat:
    try:
        return find_format(
            names,
            dataset_format=config.dataset_format,
            weight_column=config.weight_column,
            sides=config.sides,
        )
    except FasttrError as error:
        raise FasttrError(f"{config.place}: {error}") from None


def _encode_dataset(
    rows: Any, encoder: Encoder, options: dict[str, Any], config: DataConfig
) -> Columns:
    names = list(encoder.row_format.columns)
    key = [rows._fingerprint, tokenizer_fingerprint(encoder.tokenizer), options]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16)
    try:
        encoded = (
            rows.with_format(None)
            .select_columns(names)
            .map(
                encoder,
                batched=True,
                with_indices=True,
                remove_columns=names,
                features=encoder.features(),
                num_proc=config.num_proc,
                new_fingerprint=digest.hexdigest(),
                desc=f"Tokenizing {config.split}",
            )
        )
    except OSError as error:
        raise FasttrError(
            f"the tokens cannot be written to the cache ({error}): free space there, or name "
            "another cache_dir"
        ) from error
    return Columns.of_dataset(encoded)


def _encode_list(rows: Sequence[Mapping[str, Any]], encoder: Encoder) -> Columns:
    columns: dict[str, list[Any]] = {name: [] for name in encoder.columns}
    for first in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[first : first + ROWS_AT_ONCE]
        batch = {name: [row.get(name) for row in block] for name in encoder.row_format.columns}
        for name, values in encoder(batch, range(first, first + len(block))).items():
            columns[name] += values
    return Columns.of_lists(columns)


def _check(report: DataReport, config: DataConfig) -> None:
    reasons = "; ".join(f"{count}: {reason}" for reason, count in report.dropped.items())
    dropped = report.rows - report.kept
    if report.kept == 0:
        raise FasttrError(
            f"{config.place}: none of {report.rows} rows can be trained on ({reasons})"
        )
    if dropped > config.max_dropped_fraction * report.rows:
        raise FasttrError(
            f"{config.place}: {dropped} of {report.rows} rows dropped ({reasons}), above "
            f"max_dropped_fraction {config.max_dropped_fraction}: mend the rows or raise it"
        )
    limit = config.max_boundary_mismatch
    if limit is not None and report.boundary_mismatches > limit * report.rows:
        raise FasttrError(
            f"{config.place}: in {report.boundary_mismatches} of {report.rows} rows the prompt's "
            f"tokens are not how the whole text begins, above max_boundary_mismatch {limit}: end "
            "prompts on a token boundary, or raise it"
        )
