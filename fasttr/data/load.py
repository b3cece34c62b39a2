"""A data set to tokenised trees: read, encode, drop what cannot be trained on, report."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fasttr.data.arrow import ODD_ROLE, Columns, TreeSet
from fasttr.data.encoder import Encoder, Shape
from fasttr.data.formats import DATASET_FORMATS, LEFT_OUT, RowFormat, Skipped, Status, find_format
from fasttr.data.reading import looks_like_hh, read_batch, unknown_role
from fasttr.data.report import DataReport
from fasttr.data.sources import check_features, read_rows
from fasttr.data.tokens import require_eos, tokenizer_fingerprint
from fasttr.data.unpaired import shares_of
from fasttr.errors import FasttrError, first_line

# Part of every cache key: raise it when the same rows and options would give other tokens.
ENCODING_VERSION = 2
ROWS_AT_ONCE = 1000  # also what TRL takes pairs apart in


@dataclass(frozen=True)
class DataConfig:
    """Which rows to read and how to encode them. FasttrError on a value out of range."""

    name: str = "the rows"  # hub id, folder, or .json, .jsonl, .parquet, .csv file (.gz too)
    config: str | None = None  # configuration of a hub data set
    split: str = "train"  # a single file has the split train alone
    dataset_format: str | None = None  # None: by columns; hh_rlhf: raw transcripts
    columns: Mapping[str, str] = field(default_factory=dict)  # name here -> name in the data
    max_length: int | None = 1024  # prompt + completion, a side; None: no cut
    max_prompt_length: int | None = None  # its last tokens are kept
    max_completion_length: int | None = None
    keeps_end: bool = False  # max_length cuts on the left
    weight_column: str | None = None
    sides: int = 2  # 1: keep the chosen side of a pair alone, once both are encoded
    takes_pairs_apart: bool = False  # chosen and rejected become rows with a verdict
    drops_identical: bool = True  # leave out pairs whose sides are the same tokens
    max_dropped_fraction: float = 1.0
    max_boundary_mismatch: float | None = None  # fraction of rows
    num_proc: int | None = None
    most_rows: int | None = None  # of a stream: no more kept rows than these are read
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
    def shape(self) -> Shape:
        return Shape(**{one.name: getattr(self, one.name) for one in fields(Shape)})

    @property
    def options(self) -> dict[str, Any]:
        """What, beside rows, format and tokenizer, decides the tokens."""
        return {"version": ENCODING_VERSION, **asdict(self.shape)}


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

    A `datasets.Dataset` is tokenised through its cache, a list of mappings in memory, and a
    `datasets.IterableDataset` in memory as far as `most_rows` asks.
    """
    require_eos(tokenizer)
    rows = _renamed(rows, config)
    names = _column_names(rows, config)
    row_format = _find_format(names, config)
    encoder = Encoder(tokenizer, row_format, config.shape)
    options = {**config.options, "format": asdict(row_format)}
    try:
        columns = _encoded(rows, encoder, options, config)
        hints = _hints(rows, names, row_format, columns)
    except FasttrError as error:
        raise FasttrError(f"{config.place}: {error}") from error
    report = DataReport.of(
        columns, name=config.name, split=config.split, shape=config.shape, hints=hints
    )
    _check(report, config)
    return TreeSet(columns, report, options, most=config.most_rows)


def is_stream(rows: Any) -> bool:
    """Whether rows come one after the other and cannot be counted, as a `IterableDataset`'s."""
    return hasattr(rows, "take") and not hasattr(rows, "__len__")


def _renamed(rows: Any, config: DataConfig) -> Any:
    """Rows whose columns have the names that formats know."""
    if not config.columns:
        return rows
    theirs = {there: here for here, there in config.columns.items()}
    if not hasattr(rows, "rename_columns"):
        return [{theirs.get(name, name): value for name, value in row.items()} for row in rows]
    names = rows.column_names or _first_names(rows)
    absent = [there for there in theirs if there not in names]
    if absent:
        raise FasttrError(
            f"{config.place}: columns names {absent[0]!r}, and the data set has "
            f"{', '.join(map(repr, names))}"
        )
    replaced = [here for here in config.columns if here in names and here not in theirs]
    rows = rows.remove_columns(replaced) if replaced else rows
    return rows.rename_columns({there: here for there, here in theirs.items() if there != here})


def _column_names(rows: Any, config: DataConfig) -> list[str]:
    if hasattr(rows, "column_names"):
        return rows.column_names or _first_names(rows)
    is_list = isinstance(rows, Sequence) and not isinstance(rows, str | bytes)
    if not is_list or not rows or not all(isinstance(row, Mapping) for row in rows):
        got = f"{type(rows).__name__} of {len(rows)} rows" if is_list else type(rows).__name__
        raise FasttrError(
            f"{config.place}: got {got}; wanted a datasets.Dataset, or a list of dicts with the "
            "columns of a preference set"
        )
    return list(dict.fromkeys(name for row in rows for name in row))


def _first_names(stream: Any) -> list[str]:
    """The columns of a stream that does not know them before it is read."""
    return list(next(_in_turn(stream), {}))


def _in_turn(stream: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a stream; what its reader raises becomes one line."""
    try:
        yield from stream
    except FasttrError:
        raise
    except Exception as error:  # readers of files, and generators of one's own, raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise FasttrError(f"the rows of the stream cannot be read ({reason})") from error


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


def _encoded(rows: Any, encoder: Encoder, options: dict[str, Any], config: DataConfig) -> Columns:
    if is_stream(rows):
        return _encode_stream(rows, encoder, config.most_rows)
    if hasattr(rows, "column_names"):
        check_features(config.name, rows.features, encoder.row_format.columns)
        return _encode_dataset(rows, encoder, options, config)
    # Pairs are taken apart in each process's share, as `datasets` deals them.
    shares = config.num_proc or 1 if encoder.takes_apart else 1
    blocks = (rows[part.start : part.stop] for part in _blocks(len(rows), shares))
    return _encode_blocks(blocks, encoder)


def _encode_dataset(
    rows: Any, encoder: Encoder, options: dict[str, Any], config: DataConfig
) -> Columns:
    names = list(encoder.row_format.columns)
    order = config.num_proc if encoder.takes_apart else None
    key = [rows._fingerprint, tokenizer_fingerprint(encoder.tokenizer), options, order]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16)
    what = f"Tokenizing {Path(config.name).name} ({config.split})"
    try:
        encoded = (
            rows.with_format(None)
            .select_columns(names)
            .map(
                encoder if config.num_proc else _in_sight(encoder, what, len(rows)),
                batched=True,
                batch_size=ROWS_AT_ONCE,
                with_indices=True,
                remove_columns=names,
                features=encoder.features(),
                num_proc=config.num_proc,
                new_fingerprint=digest.hexdigest(),
                desc=what,
            )
        )
    except OSError as error:
        raise FasttrError(
            f"the tokens cannot be written to the cache ({error}): free space there, or name "
            "another cache_dir"
        ) from error
    return Columns.of_dataset(encoded)


def _in_sight(encoder: Encoder, what: str, rows: int) -> Callable[..., dict[str, list[Any]]]:
    """The encoder; where `datasets` draws no bar, as into a file, lines say how far it is."""
    import datasets

    from fasttr.console import Progress

    if not datasets.are_progress_bars_disabled():
        return encoder
    progress = Progress(what, rows, "row", hides_bar=True)

    def encode(batch: Any, places: Any) -> dict[str, list[Any]]:
        encoded = encoder(batch, places)
        progress.update(len(places))
        return encoded

    return encode


def _encode_stream(rows: Any, encoder: Encoder, most: int | None) -> Columns:
    """Blocks of a stream until as many rows are kept as are wanted."""

    def until_enough() -> Iterator[list[Mapping[str, Any]]]:
        stream = _in_turn(rows)
        while block := list(itertools.islice(stream, ROWS_AT_ONCE)):
            yield block

    return _encode_blocks(until_enough(), encoder, most)


def _encode_blocks(
    blocks: Iterable[Sequence[Mapping[str, Any]]], encoder: Encoder, most: int | None = None
) -> Columns:
    columns: dict[str, list[Any]] = {name: [] for name in encoder.columns}
    first = 0
    kept = 0
    for block in blocks:
        batch = {name: [row.get(name) for row in block] for name in encoder.row_format.columns}
        encoded = encoder(batch, range(first, first + len(block)))
        for name, values in encoded.items():
            columns[name] += values
        first += len(block)
        kept += encoded["status"].count(int(Status.KEPT))
        if most is not None and kept >= most:
            break
    return Columns.of_lists(columns)


def _blocks(rows: int, shares: int) -> Iterator[range]:
    for share in shares_of(rows, min(shares, rows)):
        for first in range(share.start, share.stop, ROWS_AT_ONCE):
            yield range(first, min(first + ROWS_AT_ONCE, share.stop))


def _hints(rows: Any, names: Sequence[str], row_format: RowFormat, columns: Columns) -> list[str]:
    """What the rows are likely to be meant as, where they are read in another way."""
    hints = []
    left_out = [name for name in LEFT_OUT if name in names]
    if left_out and row_format.prompt[:1] in (("instruction",), ("conversations",)):
        hints.append(f"not read: {', '.join(left_out)}; put them into the prompt")
    if row_format.name == "paired" and not row_format.prompt and looks_like_hh(_row(rows, 0)):
        hints.append(
            "the rows look like raw HH transcripts: dataset_format: hh_rlhf takes the last "
            "Assistant turn for the completion, as the papers do"
        )
    odd = np.flatnonzero(columns.numbers["flags"] & ODD_ROLE)
    if len(odd):
        hints.append(_about_roles(rows, row_format, columns, odd))
    return hints


def _about_roles(rows: Any, row_format: RowFormat, columns: Columns, odd: np.ndarray) -> str:
    places = columns.numbers.get("read_row")
    row = int(odd[0] if places is None else places[odd[0]])
    values = _row(rows, row)
    batch = {name: [values.get(name)] for name in row_format.columns}
    (example,) = read_batch(batch, [row], row_format)
    role = None if isinstance(example, Skipped) else unknown_role(example)
    return (
        f"WARNING: {len(odd)} rows have a message of an unknown role (row {row}: {role!r}), which "
        "a chat template may leave out; wanted system, user, assistant or tool"
    )


def _row(rows: Any, row: int) -> Mapping[str, Any]:
    if is_stream(rows):
        return next(itertools.islice(_in_turn(rows), row, None))
    return rows[row]


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
