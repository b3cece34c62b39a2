"""Several data sets as one, by TRL's rules: concatenated in order, with columns chosen, in given
shares.

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
from fasttr.errors import FasttrError


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
        for key in ("path", "name", "data_dir", "split"):
            value = getattr(self, key)
            if not isinstance(value, str) and (value is not None or key in ("path", "split")):
                raise FasttrError(f"{key} is {value!r:.60}; wanted text")
        if not self.path.strip():
            raise FasttrError("path is empty; wanted a file, a folder or a hub id")
        if not _are_names(self.data_files) and not (
            isinstance(self.data_files, dict)
            and self.data_files
            and all(map(_are_names, self.data_files.values()))
        ):
            raise FasttrError(
                f"data_files is {self.data_files!r:.60}; wanted a path, a list, or lists under "
                "splits"
            )
        if isinstance(self.columns, str) or not _are_names(self.columns):
            raise FasttrError(f"columns is {self.columns!r:.60}; wanted a list of column names")
        share = self.fraction
        if share is not None and (
            isinstance(share, bool)
            or not isinstance(share, int | float)
            or not 0 <= share < math.inf
        ):
            raise FasttrError(f"fraction is {share!r:.60}; wanted a number from 0")


def _are_names(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, str)


def parse_parts(datasets: Any) -> list[Part]:
    """The parts of the setting `datasets`, a list of mappings. FasttrError names the part and the
    key at fault."""
    if not isinstance(datasets, Sequence) or isinstance(datasets, str) or not datasets:
        raise FasttrError(
            f"datasets: got {datasets!r:.60}; wanted a list of data sets, each with a path"
        )
    keys = [field.name for field in dataclasses.fields(Part)]
    parts = []
    for i, item in enumerate(datasets):
        if not isinstance(item, Mapping):
            raise FasttrError(f"datasets[{i}]: got {item!r:.60}; wanted a mapping with a path")
        unknown = [str(key) for key in item if key not in keys]
        if unknown:
            raise FasttrError(
                f"datasets[{i}]: unknown key {unknown[0]!r}; wanted {', '.join(keys)}"
            )
        if "path" not in item:
            raise FasttrError(f"datasets[{i}]: has no path; wanted a file, a folder or a hub id")
        try:
            parts.append(Part(**item))
        except FasttrError as error:
            raise FasttrError(f"datasets[{i}]: {error}") from None
    given = [part.fraction is not None for part in parts]
    if any(given) and not all(given):
        raise FasttrError(
            f"datasets[{given.index(False)}]: has no fraction, and others do: give it for all or "
            "none"
        )
    if all(given) and not 0 < (total := sum(part.fraction or 0.0 for part in parts)) < math.inf:
        raise FasttrError(
            f"datasets: the fractions add up to {total:g}; wanted a finite sum above 0"
        )
    return parts


def check_test_split_size(size: float | None) -> None:
    """Raise FasttrError unless `size` is a share below 1, a whole number of rows, or None."""
    if size is None or 0 < size < 1 or (size >= 1 and float(size).is_integer()):
        return
    raise FasttrError(
        f"test_split_size: got {size!r}; wanted a share between 0 and 1, or a whole number of rows"
    )


def read_mixture(
    parts: Sequence[Part],
    *,
    test_split_size: float | None = None,
    seed: int = 42,
    cache_dir: str | None = None,
) -> dict[str, Any]:
    """The mixture as `datasets.Dataset`s under `train` and, with `test_split_size`, `test`.

    With fractions the first rows of every part are kept, as many as make the largest mixture in
    those shares for which no part is needed twice. `test_split_size` draws rows at random from
    `seed`; in TRL two processes draw differently.
    """
    import datasets

    read = []
    for i, part in enumerate(parts):
        rows = read_rows(
            part.path,
            config=part.name,
            split=part.split,
            data_dir=part.data_dir,
            data_files=part.data_files,
            cache_dir=cache_dir,
        )
        if part.columns is not None:
            absent = [name for name in part.columns if name not in rows.column_names]
            if absent:
                raise FasttrError(
                    f"datasets[{i}]: {part.path} has no column {absent[0]!r}: it has "
                    f"{', '.join(rows.column_names)}"
                )
            rows = rows.select_columns(part.columns)
        read.append(rows)
    shares = [part.fraction for part in parts]
    if all(share is not None for share in shares):
        counts = kept_rows([len(rows) for rows in read], [share or 0.0 for share in shares])
        read = [rows.select(range(count)) for rows, count in zip(read, counts, strict=True)]
    if not any(map(len, read)):
        raise FasttrError(
            "datasets: the fractions leave no rows: give more rows or other fractions"
        )
    try:
        mixed = datasets.concatenate_datasets(read)
    except (ValueError, TypeError) as error:  # columns of one name and different types
        raise FasttrError(
            f"datasets: the parts do not fit together: {' '.join(str(error).split())[:300]}"
        ) from error
    if test_split_size is None:
        return {"train": mixed}
    size: float = int(test_split_size) if test_split_size >= 1 else test_split_size
    try:
        split = mixed.train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        raise FasttrError(
            f"test_split_size: {size} of {len(mixed)} rows leaves nothing for one side"
        ) from error
    return {"train": split["train"], "test": split["test"]}


def kept_rows(lengths: Sequence[int], fractions: Sequence[float]) -> list[int]:
    """How many rows of each part are kept: round(share x total), total as large as the scarcest
    part allows."""
    total_share = sum(fractions)
    weights = [fraction / total_share for fraction in fractions]
    total = min(
        length / weight for length, weight in zip(lengths, weights, strict=True) if weight > 0
    )
    return [round(weight * total) for weight in weights]
