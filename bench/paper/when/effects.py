"""What the runs say: differences within a setting, their simultaneous intervals, and words.

A difference is between two runs of one setting (the same initial policy, pairs, order, prompts and
noise of the samples). The seed is the unit: a level of a factor is the mean of a seed's settings at
that level, so it is one number a seed.

Intervals hold together. Under the hypothesis that an arm and its baseline do not differ, all
differences of a seed may change their sign together; c is what the largest |t| of a family exceeds
in a share `miss` of the sign patterns, and an interval is the mean +- c standard errors. That is
Westfall and Young's single step: comparisons that move together cost little, and nothing is assumed
of the distribution but symmetry.

Legend: S seeds, C comparisons of a family, F sign patterns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bench.paper.when.design import FACTORS, Setting
from bench.paper.when.runs import CONTROLS, MOVING
from bench.paper.when.study import Record
from fasttr.toy.outcomes import Rows, at_equal_kl, at_the_end

MISS = 0.05  # of all intervals of one outcome together
EXACT_UP_TO = 14  # seeds whose sign patterns are all looked at
PATTERNS = 20_000  # drawn for more seeds

Level = Callable[[Setting], bool]


def when_stopped(key: str, moving: Rows, fixed: Rows) -> float:
    """Each where its held-out margin is largest in units of its own standard error."""
    return _stopped(moving)[key] - _stopped(fixed)[key]


def _stopped(rows: Rows) -> dict[str, float]:
    """The margin itself grows for as long as the policy drifts; in units of its spread over pairs
    it has a peak. The initial policy, whose margin is 0, is never chosen."""

    def margin(row: dict[str, float]) -> float:
        return (row["chosen"] - row["rejected"]) / max(row["margin_stderr"], 1e-9)

    return max(rows[1:], key=margin)


class Outcome(NamedTuple):
    """What is compared, and which sign is good (0: neither)."""

    name: str
    difference: Callable[[str, Rows, Rows], float]
    key: str
    good: int

    def of(self, moving: Rows, fixed: Rows) -> float:
        return self.difference(self.key, moving, fixed)


PRIMARY = Outcome("gold reward at equal KL", at_equal_kl, "gold", +1)
KL = Outcome("KL after the same steps", at_the_end, "kl", 0)
OUTCOMES = (
    PRIMARY,
    Outcome("gold reward after the same steps", at_the_end, "gold", +1),
    Outcome("gold reward, each stopped by its held-out margin", when_stopped, "gold", +1),
    Outcome("mass out of distribution at equal KL", at_equal_kl, "outside", -1),
    Outcome("mass out of distribution after the same steps", at_the_end, "outside", -1),
    KL,
    Outcome("length after the same steps", at_the_end, "length", 0),
    Outcome("log-ratio of the chosen after the same steps", at_the_end, "chosen", 0),
    Outcome("log-ratio of the rejected after the same steps", at_the_end, "rejected", 0),
    Outcome("held-out accuracy after the same steps", at_the_end, "accuracy", +1),
)


class Effect(NamedTuple):
    """A mean over seeds with its simultaneous interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> int:
        return int(self.low > 0) - int(self.high < 0)

    def negated(self) -> Effect:
        return Effect(-self.mean, -self.high, -self.low, self.seeds)

    def text(self, digits: int = 3) -> str:
        if self.seeds == 0:
            return "no seed"
        if math.isinf(self.high):
            return f"{self.mean:+.{digits}f} (too few seeds)"
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def levels() -> dict[str, Level]:
    """Everything, then each level of each factor."""
    found: dict[str, Level] = {"all": lambda setting: True}
    for factor, values in FACTORS.items():
        for value in values:
            found[_name(factor, value)] = _is(factor, value)
    return found


def cells() -> dict[str, Level]:
    """Each writer with each part."""
    found: dict[str, Level] = {}
    for writer in FACTORS["writer"]:
        for part in FACTORS["part"]:
            found[f"{writer} x {part}"] = _both(_is("writer", writer), _is("part", part))
    return found


def _name(factor: str, value: object) -> str:
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"{factor} {shown}"


def _is(factor: str, value: object) -> Level:
    return lambda setting: getattr(setting, factor) == value


def _both(first: Level, second: Level) -> Level:
    return lambda setting: first(setting) and second(setting)


def effects(
    records: Sequence[Record], outcome: Outcome, arms: Sequence[str] = MOVING, baseline="fixed"
) -> dict[tuple[str, str], Effect]:
    """(arm, level) -> effect, of levels and cells: two families, each given half of MISS."""
    found = {}
    for family in (levels(), cells()):
        names = [(arm, level) for arm in arms for level in family]
        columns = [by_seed(records, outcome, arm, baseline, family[level]) for arm, level in names]
        table = np.stack(columns, axis=1)
        found |= dict(zip(names, simultaneous(table, MISS / 2), strict=True))
    return found


def against_controls(
    records: Sequence[Record], outcome: Outcome = PRIMARY
) -> dict[tuple[str, str], Effect]:
    """(arm, control) -> effect over all settings: one family. And linear less fixed."""
    names = [(arm, control) for arm in MOVING for control in CONTROLS]
    names += [(control, "fixed") for control in CONTROLS]
    columns = [
        by_seed(records, outcome, arm, baseline, lambda setting: True) for arm, baseline in names
    ]
    return dict(zip(names, simultaneous(np.stack(columns, axis=1), MISS), strict=True))


def by_seed(
    records: Sequence[Record], outcome: Outcome, arm: str, baseline: str, level: Level
) -> np.ndarray:
    """(S,) means over a seed's settings at the level; NaN where it has none."""
    runs = {(r.seed, r.setting, r.arm): r.rows for r in records if level(r.setting)}
    found = []
    for seed in sorted({record.seed for record in records}):
        differences = [
            outcome.of(rows, runs[(seed, setting, baseline)])
            for (of, setting, name), rows in runs.items()
            if of == seed and name == arm
        ]
        found.append(np.mean(differences) if differences else np.nan)
    return np.array(found)


def simultaneous(table: np.ndarray, miss: float) -> list[Effect]:
    """An effect for each column of (S, C), NaN where a seed says nothing of a comparison."""
    critical = critical_value(table, miss)
    mean, error, count = _moments(table, np.ones((1, len(table))))
    half = np.full(len(count), np.inf) if np.isinf(critical) else critical * error[0]
    return [
        Effect(float(m), float(m - h), float(m + h), int(n))
        for m, h, n in zip(mean[0], half, count, strict=True)
    ]


def critical_value(table: np.ndarray, miss: float) -> float:
    """The c above; inf where there are too few seeds to leave anything out."""
    signs = sign_patterns(len(table))
    mean_FC, error_FC, count_C = _moments(table, signs)
    above = math.floor(miss * len(signs))  # patterns that may lie above c
    if above == 0 or count_C.min() < 2:
        return math.inf
    t_FC = np.abs(mean_FC) / np.maximum(error_FC, 1e-12)
    return float(np.sort(t_FC.max(axis=1))[-above - 1])


def _moments(table: np.ndarray, signs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Under each pattern of signs (F, S): means and standard errors (F, C); seeds counted (C,)."""
    filled = np.nan_to_num(table)
    count = (~np.isnan(table)).sum(axis=0)
    at_least_one = np.maximum(count, 1)
    mean_FC = signs @ filled / at_least_one
    spread_FC = (filled**2).sum(axis=0) - count * mean_FC**2  # signs leave squares as they are
    variance_FC = np.maximum(spread_FC, 0) / np.maximum(count - 1, 1)
    return mean_FC, np.sqrt(variance_FC / at_least_one), count


def sign_patterns(seeds: int) -> np.ndarray:
    """(F, S) of +1 and -1: all of them, or PATTERNS draws with the observed one among them."""
    if seeds <= EXACT_UP_TO:
        bits = np.arange(2**seeds)[:, None] >> np.arange(seeds)
        return 1.0 - 2.0 * (bits & 1)
    drawn = np.random.default_rng(0).choice([-1.0, 1.0], size=(PATTERNS, seeds))
    drawn[0] = 1
    return drawn
