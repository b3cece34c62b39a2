"""The length-controlled win rate of AlpacaEval 2 (arXiv:2404.04475).

The judge's preference for the model is fitted by a logistic regression on the difference of
lengths, the difficulty of the instruction and which model it is; the win rate is its mean where the
lengths are equal:

    p(model preferred) = sigmoid(a tanh((len(baseline) - len(model)) / std) + b difficulty + c)

Without an intercept besides c, with an L1 penalty whose strength C is chosen by five-fold
cross-validation. Answers of the baseline that were made shorter and longer on purpose enter with
weight 0.2 / 2 and without c; they and the difficulties are in AlpacaEval's df_gamed.csv.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttr.errors import FasttrError, one_line

FOLDS = 5
STRENGTHS = np.logspace(-4, 4, 10)  # C of liblinear: the weight of the data beside the penalty
GAMED_WEIGHT = 0.2 / 2  # there are two gamed versions of the baseline


class Gamed(NamedTuple):
    """df_gamed.csv: the baseline's own answers, made shorter or longer."""

    preference: np.ndarray  # (n,) of [0, 1], NaN where the judge gave none
    length_difference: np.ndarray  # (n,) already over its standard deviation
    instruction: np.ndarray  # (n,) its place in AlpacaEval
    difficulty: np.ndarray  # (n,) of that instruction


def read_gamed(path: str | Path) -> Gamed:
    """FasttrError where it is another file."""
    names = ("preference", "std_delta_len", "index", "instruction_difficulty")
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = [np.array([float(row[name] or "nan") for row in rows]) for name in names]
    except (OSError, KeyError, ValueError) as error:
        raise FasttrError(
            f"length_control_file: {path} cannot be read ({one_line(error)}); wanted AlpacaEval's "
            f"df_gamed.csv with the columns {', '.join(names)}"
        ) from error
    preference, difference, instruction, difficulty = columns
    return Gamed(preference, difference, instruction.astype(int), difficulty)


def length_controlled(
    preference: Sequence[float],  # of [0, 1], NaN where there is none
    model_lengths: Sequence[int],  # characters
    baseline_lengths: Sequence[int],
    gamed: Gamed,
) -> np.ndarray:
    """(n,) probability that the model is preferred to the baseline at equal lengths, one for every
    instruction in AlpacaEval's order."""
    preference_n = np.asarray(preference, dtype=np.float64)
    difference = np.asarray(baseline_lengths, float) - np.asarray(model_lengths, float)
    difference /= difference.std(ddof=1)
    difficulty_of = dict(zip(gamed.instruction.tolist(), gamed.difficulty.tolist(), strict=True))
    if any(place not in difficulty_of for place in range(len(preference_n))):
        raise FasttrError(
            f"length_control_file: it has no difficulty of some of {len(preference_n)} "
            "instructions; wanted all of AlpacaEval in their order"
        )
    difficulty = np.array([difficulty_of[place] for place in range(len(preference_n))])
    of_gamed = _features(gamed.length_difference, gamed.difficulty, is_model=0.0)
    of_model = _features(difference, difficulty, is_model=1.0)
    x = np.concatenate([of_gamed, of_model])
    y = np.concatenate([gamed.preference, preference_n])
    weight = np.concatenate([np.full(len(of_gamed), GAMED_WEIGHT), np.ones(len(of_model))])
    is_known = ~np.isnan(y)
    coefficients = fit(x[is_known], y[is_known], weight[is_known])
    at_equal_lengths = _features(np.zeros_like(difference), difficulty, is_model=1.0)
    return _logistic(at_equal_lengths @ coefficients)


def fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Coefficients at the strength that predicts held-out rows best.

    x: (n, d); y: (n,) of [0, 1]; weight: (n,). Rows are dealt to the folds from the last one on, as
    scikit-learn's GroupKFold deals groups of one size.
    """
    fold = (len(y) - 1 - np.arange(len(y))) % FOLDS
    losses = np.zeros(len(STRENGTHS))
    for place, strength in enumerate(STRENGTHS):
        for number in range(FOLDS):
            held = fold == number
            found = l1_logistic(x[~held], y[~held], weight[~held], strength)
            p = np.clip(_logistic(x[held] @ found), 1e-15, 1 - 1e-15)
            of_rows = y[held] * np.log(p) + (1 - y[held]) * np.log(1 - p)
            losses[place] -= float(np.mean(weight[held] * of_rows)) / FOLDS
    return l1_logistic(x, y, weight, float(STRENGTHS[np.argmin(losses)]))


def l1_logistic(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, strength: float, most: int = 1000
) -> np.ndarray:
    """The minimum of |b|_1 + C sum_i w_i (cross-entropy of y_i and sigmoid(x_i b)).

    Newton's quadratic model of the data, minimised coordinate by coordinate with soft thresholds,
    and a step that is halved until the objective falls.
    """

    def objective(b: np.ndarray) -> float:
        z = x @ b
        data = np.logaddexp(0, z) - y * z
        return float(np.abs(b).sum() + strength * (weight @ data))

    b = np.zeros(x.shape[1])
    value = objective(b)
    for _ in range(most):
        p = _logistic(x @ b)
        gradient = strength * (x.T @ (weight * (p - y)))
        curvature = strength * (x.T * (weight * p * (1 - p))) @ x + 1e-12 * np.eye(len(b))
        step = _quadratic_minimum(b, gradient, curvature) - b
        size = 1.0
        while size > 1e-12 and objective(b + size * step) > value:
            size /= 2
        new = objective(b + size * step)
        b = b + size * step
        if value - new <= 1e-12 * max(1.0, abs(value)):
            return b
        value = new
    return b


def _quadratic_minimum(b: np.ndarray, gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Of gradient (c - b) + (c - b) curvature (c - b) / 2 + |c|_1 over c."""
    c = b.copy()
    for _ in range(200):
        before = c.copy()
        for j in range(len(c)):
            slope = gradient[j] + curvature[j] @ (c - b)
            target = c[j] - slope / curvature[j, j]
            c[j] = np.sign(target) * max(abs(target) - 1 / curvature[j, j], 0.0)
        if np.abs(c - before).max() < 1e-13:
            break
    return c


def _features(difference: np.ndarray, difficulty: np.ndarray, is_model: float) -> np.ndarray:
    return np.stack([np.tanh(difference), difficulty, np.full_like(difficulty, is_model)], axis=1)


def _logistic(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
