"""Several data sets as one: in TRL's form, and in alignment-handbook's.

The split into train and test is drawn from a seed, so that every process of a run draws the same
rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasttr.data.sources import DataFiles, read_rows
from fasttr.errors import FasttrError, one_line


@dataclass(frozen=True)
class Part:
    """One data set of a mixture, under TRL's keys. FasttrError on a value that cannot be meant."""

    path: str  # hub id, folder or file; or json, parquet, csv, arrow with data_files
    name: str | None = None  # configuration of a hub data set
    data_dir: str | None = None
    data_files: DataFiles = None
    split: str = "train"
    columns: list[str] | None = None  # None: all
    fraction: float | None = None  # target share of the mixture; for all parts or none

    def __post_init__(self) -> None:
        _check_text(self, required=("path", "split"), optional=("name", "data_dir"))
        if not self.path.strip():
            raise FasttrError("path is empty; wanted a file, a folder or a hub id")
        by_split = self.data_files if isinstance(self.data_files, dict) else None
        groups = [self.data_files] if by_split is None else list(by_split.values())
        if not groups or not all(map(_are_names, groups)):
            raise FasttrError(
                f"data_files is {self.data_files!r:.60}; wanted a path, a list, or lists under "
                "splits"
            )
        _check_columns(self.columns)
        _check_share("fraction", self.fraction)


@dataclass(frozen=True)
class HandbookPart:
    """One data set of alignment-handbook's `dataset_mixture`, under its keys."""

    id: str
    config: str | None = None
    split: str = "train"
    columns: list[str] | None = None
    weight: float | None = 1.0  # share of its rows that is kept

    def __post_init__(self) -> None:
        _check_text(self, required=("id", "split"), optional=("config",))
        _check_columns(self.columns)
        _check_share("weight", self.weight)


@dataclass(frozen=True)
class HandbookMixture:
    """alignment-handbook's `dataset_mixture`, or its older `dataset_mixer`."""

    datasets: list[HandbookPart]
    seed: int = 0
    test_split_size: float | None = None
    # What the older form does: the first rows of a part are kept instead of drawn ones, and test
    # rows are those of other splits.
    draws_rows: bool = True
    test_datasets: list[HandbookPart] = dataclasses.field(default_factory=list)


# Columns that alignment-handbook's `dataset_mixer` keeps, of those that a part has.
MIXER_COLUMNS = ("messages", "chosen", "rejected", "prompt", "completion", "label")


def parse_parts(datasets: Any) -> list[Part]:
    """The parts of the setting `datasets`, a list of mappings. FasttrError names the part and the
    key at fault."""
    parts = _parsed(datasets, Part, "datasets", "path")
    given = [part.fraction is not None for part in parts]
    if any(given) and not all(given):
        raise FasttrError(
            f"datasets[{given.index(False)}]: has no fraction, and others do: give it for all or "
            "none"
        )
    total = sum(part.fraction or 0.0 for part in parts)
    if all(given) and not 0 < total < math.inf:
        raise FasttrError(
            f"datasets: the fractions add up to {total:g}; wanted a finite sum above 0"
        )
    return parts


def parse_handbook(mixture: Any) -> HandbookMixture:
    """The setting `dataset_mixture`. FasttrError names the key at fault."""
    keys = [field.name for field in dataclasses.fields(HandbookMixture)]
    if not isinstance(mixture, Mapping) or "datasets" not in mixture:
        raise FasttrError(
            f"dataset_mixture: got {mixture!r:.60}; wanted a mapping with datasets, a list of "
            "id, config, split, columns, weight"
        )
    unknown = [str(key) for key in mixture if key not in keys]
    if unknown:
        raise FasttrError(f"dataset_mixture: unknown key {unknown[0]!r}; wanted {', '.join(keys)}")
    values = dict(mixture)
    seed, size = values.get("seed", 0), values.get("test_split_size")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise FasttrError(f"dataset_mixture: seed is {seed!r:.60}; wanted a whole number from 0")
    if size is not None and not _is_size(size):
        raise FasttrError(
            f"dataset_mixture: test_split_size is {size!r:.60}; wanted a share between 0 and 1, or "
            "a whole number of rows"
        )
    for name in ("datasets", "test_datasets"):
        if values.get(name):
            values[name] = _parsed(values[name], HandbookPart, f"dataset_mixture.{name}", "id")
    if not values["datasets"]:
        raise FasttrError("dataset_mixture: datasets is empty; wanted at least one data set")
    return HandbookMixture(**values)


def read_mixture(
    parts: Sequence[Part],
    *,
    test_split_size: float | None = None,
    seed: int = 42,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """The mixture as `datasets.Dataset`s under `train` and, with `test_split_size`, `test`.

    With fractions the first rows of every part are kept, as many as make the largest mixture in
    those shares for which no part is needed twice. `test_split_size` draws rows at random from
    `seed`; in TRL two processes draw differently. A stream has neither.
    """
    shares = [part.fraction for part in parts]
    if streaming and (test_split_size is not None or any(share is not None for share in shares)):
        raise FasttrError(
            "streaming: a stream's rows are not counted, so fraction and test_split_size cannot "
            "be had; leave them out"
        )
    read = [_read_part(i, part, streaming, cache_dir) for i, part in enumerate(parts)]
    if all(share is not None for share in shares):
        counts = kept_rows([len(rows) for rows in read], [share or 0.0 for share in shares])
        read = [rows.select(range(count)) for rows, count in zip(read, counts, strict=True)]
    if not streaming and not any(map(len, read)):
        raise FasttrError(
            "datasets: the fractions leave no rows: give more rows or other fractions"
        )
    return _with_test_split(_concatenated(read), test_split_size, seed)


def read_handbook(mixture: HandbookMixture, cache_dir: str | None = None) -> dict[str, Any]:
    """alignment-handbook's mixture under `train` and, where it has one, `test`.

    Every part is shuffled and cut to its weight, the whole is shuffled, and the test rows are drawn
    from it, all with one seed. In its older form the first rows of a part are kept.
    """
    parts = [_read_handbook_part(i, part, mixture) for i, part in enumerate(mixture.datasets)]
    mixed = _concatenated(parts).shuffle(seed=mixture.seed)
    if len(mixed) == 0:
        raise FasttrError("dataset_mixture: the weights leave no rows: give larger ones")
    if mixture.test_datasets:
        tests = [
            _read_handbook_part(i, part, mixture) for i, part in enumerate(mixture.test_datasets)
        ]
        return {"train": mixed, "test": _concatenated(tests).shuffle(seed=mixture.seed)}
    return _with_test_split(mixed, mixture.test_split_size, mixture.seed)


def kept_rows(lengths: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """How many rows of each part are kept: round(share x total), total as large as the scarcest
    part allows."""
    total_share = sum(fractions)
    weights = [fraction / total_share for fraction in fractions]
    total = min(
        length / weight for length, weight in zip(lengths, weights, strict=True) if weight > 0
    )
    return [round(weight * total) for weight in weights]


def _parsed(items: Any, kind: type, setting: str, needed: str) -> list[Any]:
    """A list of mappings as parts of a kind."""
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise FasttrError(
            f"{setting}: got {items!r:.60}; wanted a list of data sets, each with a {needed}"
        )
    keys = [field.name for field in dataclasses.fields(kind)]
    parts = []
    for i, item in enumerate(items):
        place = f"{setting}[{i}]"
        if not isinstance(item, Mapping):
            raise FasttrError(f"{place}: got {item!r:.60}; wanted a mapping with a {needed}")
        unknown = [str(key) for key in item if key not in keys]
        if unknown:
            raise FasttrError(f"{place}: unknown key {unknown[0]!r}; wanted {', '.join(keys)}")
        if needed not in item:
            raise FasttrError(f"{place}: has no {needed}; wanted a file, a folder or a hub id")
        try:
            parts.append(kind(**item))
        except FasttrError as error:
            raise FasttrError(f"{place}: {error}") from None
    return parts


def _check_text(part: Any, required: Sequence[str], optional: Sequence[str]) -> None:
    for key in (*required, *optional):
        value = getattr(part, key)
        is_left_out = value is None and key in optional
        if not isinstance(value, str) and not is_left_out:
            raise FasttrError(f"{key} is {value!r:.60}; wanted text")


def _check_columns(columns: Any) -> None:
    if isinstance(columns, str) or not _are_names(columns):
        raise FasttrError(f"columns is {columns!r:.60}; wanted a list of column names")


def _check_share(key: str, share: Any) -> None:
    if share is None:
        return
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 <= share < math.inf:
        raise FasttrError(f"{key} is {share!r:.60}; wanted a number from 0")


def _are_names(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, str)


def _is_size(size: Any) -> bool:
    if isinstance(size, bool) or not isinstance(size, int | float):
        return False
    return 0 < size < 1 or (size >= 1 and float(size).is_integer())


def _read_part(place: int, part: Part, streaming: bool, cache_dir: str | None) -> Any:
    rows = read_rows(
        part.path,
        config=part.name,
        split=part.split,
        data_dir=part.data_dir,
        data_files=part.data_files,
        streaming=streaming,
        cache_dir=cache_dir,
    )
    return _with_columns(rows, part.columns, f"datasets[{place}]: {part.path}")


def _read_handbook_part(place: int, part: HandbookPart, mixture: HandbookMixture) -> Any:
    rows = read_rows(part.id, config=part.config, split=part.split)
    columns = part.columns
    if not mixture.draws_rows:
        columns = [name for name in rows.column_names if name in MIXER_COLUMNS]
    rows = _with_columns(rows, columns, f"dataset_mixture.datasets[{place}]: {part.id}")
    if part.weight is None:
        return rows
    if part.weight > 1:
        raise FasttrError(
            f"dataset_mixture.datasets[{place}]: weight is {part.weight:g}; wanted a share from 0 "
            "to 1, since no row is used twice"
        )
    if mixture.draws_rows:
        rows = rows.shuffle(seed=mixture.seed)
    return rows.select(range(int(len(rows) * part.weight)))


def _with_columns(rows: Any, columns: Sequence[str] | None, place: str) -> Any:
    if columns is None:
        return rows
    absent = [name for name in columns if name not in (rows.column_names or columns)]
    if absent:
        raise FasttrError(
            f"{place} has no column {absent[0]!r}: it has {', '.join(rows.column_names)}"
        )
    return rows.select_columns(list(columns))


def _concatenated(parts: list[Any]) -> Any:
    import datasets

    try:
        return datasets.concatenate_datasets(parts)
    except (ValueError, TypeError) as error:  # columns of one name and different types
        raise FasttrError(f"datasets: the parts do not fit together: {one_line(error)}") from error


def _with_test_split(rows: Any, test_split_size: float | None, seed: int) -> dict[str, Any]:
    if test_split_size is None:
        return {"train": rows}
    size: float = int(test_split_size) if test_split_size >= 1 else test_split_size
    try:
        split = rows.train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        raise FasttrError(
            f"test_split_size: {size} of {len(rows)} rows leaves nothing for one side"
        ) from error
    return {"train": split["train"], "test": split["test"]}
