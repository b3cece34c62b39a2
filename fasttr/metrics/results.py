"""One number for each row of an evaluation, kept beside a run so that runs compare row by row.

RUN/results/NAME.json holds the last of each kind. Two runs that were measured on the same rows
share most of their chance: the interval of their paired difference is narrower than those of the
two means suggest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttr.errors import FasttrError, one_line
from fasttr.files import write_json

FOLDER = "results"
Z95 = 1.959964  # standard errors to either side of a 95 % interval


@dataclass(frozen=True)
class Results:
    """What was measured, and its value at every row."""

    name: str  # of the file
    title: str
    rows: str  # says which rows they are: equal where runs may be compared
    values: Sequence[float]
    step: int | None = None
    no_effect: float | None = None  # a value to compare with, such as 1/2 for a win rate


class Estimate(NamedTuple):
    """A mean over rows."""

    mean: float
    stderr: float
    n: int

    @property
    def low(self) -> float:
        """Of the 95 % interval."""
        return self.mean - Z95 * self.stderr

    @property
    def high(self) -> float:
        return self.mean + Z95 * self.stderr


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of independent rows; NaN with fewer than two."""
    found = np.asarray(values, dtype=np.float64)
    n = len(found)
    stderr = float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(found.mean()) if n else math.nan, stderr, n)


def paired_difference(of: Results, to: Results) -> Estimate:
    """Mean of `of` minus `to`, row by row. FasttrError where the rows are not the same."""
    if of.rows != to.rows or len(of.values) != len(to.values):
        raise FasttrError(
            f"{of.title}: measured on other rows ({of.rows}, {to.rows}); nothing to pair"
        )
    return estimate(np.asarray(of.values, dtype=float) - np.asarray(to.values, dtype=float))


def write_results(run_dir: Path, results: Results) -> None:
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    values = [round(float(value), 7) for value in results.values]
    write_json(folder / f"{results.name}.json", {**asdict(results), "values": values})


def read_results(run_dir: Path) -> dict[str, Results]:
    """All of a run by name. FasttrError on a file that is none of ours."""
    found = {}
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            found[path.stem] = Results(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FasttrError(f"{path}: cannot be read as results: {one_line(error)}") from error
    return found
