"""Intervals over seeds, and the words that they allow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

# Student's 97.5 % points by degrees of freedom; beyond them Cornish and Fisher's expansion is right
# to 3 digits.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Interval(NamedTuple):
    """A mean over seeds with its 95 % Student interval; NaN bounds when one seed is all there
    is."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval leaves zero out, else 0: the only threshold in the
        verdicts."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def text(self, digits: int = 3) -> str:
        if self.n == 0:
            return "no data"
        if math.isnan(self.low):
            return f"{self.mean:+.{digits}f} (one seed: no interval)"
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def t975(df: int) -> float:
    """Two-sided 95 % point of Student's distribution."""
    if df <= len(T975):
        return T975[df - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def interval(values: Iterable[float]) -> Interval:
    """Mean and interval of one number a seed; seeds without one (NaN) are left out."""
    x = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(x) == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = t975(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half, len(x))


def words(difference: Interval, up: str, down: str, none: str) -> str:
    """What an interval of a difference says: `up`, `down`, or `none` where it holds zero or there
    is no interval."""
    return {1: up, -1: down, 0: none}[difference.sign] + f" ({difference.text()})"
