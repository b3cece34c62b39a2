"""AlpacaEval 2's length-controlled win rate: the fit against the conditions of its minimum, and the
number against the model that the data were drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from fasttr.errors import FasttrError
from fasttr.evaluation.length_controlled import (
    Gamed,
    fit,
    l1_logistic,
    length_controlled,
    read_gamed,
)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def drawn(n: int, coefficients, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, len(coefficients)))
    weight = rng.uniform(0.05, 1.0, n)
    y = (rng.random(n) < sigmoid(x @ np.array(coefficients))).astype(float)
    return x, np.clip(0.9 * y + 0.05, 0, 1), weight


@pytest.mark.parametrize("strength", [0.02, 0.3, 10.0, 1e4])
def test_the_fit_meets_the_conditions_of_the_minimum(strength):
    """|b|_1 + C sum w (...) is least where C times the gradient of the data is -sign(b_j), and
    within [-1, 1] where b_j is 0."""
    x, y, weight = drawn(300, [1.2, -0.4, 0.0, 0.15])
    b = l1_logistic(x, y, weight, strength)
    gradient = np.array(
        [
            strength
            * sum(
                w * (sigmoid(row @ b) - label) * row[j]
                for row, label, w in zip(x, y, weight, strict=True)
            )
            for j in range(4)
        ]
    )
    for slope, value in zip(gradient, b, strict=True):
        if value != 0:
            assert slope == pytest.approx(-np.sign(value), abs=1e-5)
        else:
            assert abs(slope) <= 1 + 1e-6
    assert (b == 0).any() == (strength < 1)


def test_the_strength_is_the_one_that_predicts_held_out_rows_best():
    x, y, weight = drawn(150, [0.9, 0.0, 0.0], seed=3)
    losses = {}
    for strength in np.logspace(-4, 4, 10):
        total = 0.0
        for fold in range(5):
            held = np.array([(149 - i) % 5 == fold for i in range(150)])
            p = sigmoid(x[held] @ l1_logistic(x[~held], y[~held], weight[~held], strength))
            total += -np.mean(weight[held] * (y[held] * np.log(p) + (1 - y[held]) * np.log(1 - p)))
        losses[strength] = total
    best = min(losses, key=losses.get)
    assert 1e-4 < best < 1e4
    assert fit(x, y, weight) == pytest.approx(l1_logistic(x, y, weight, best))


def annotated(n: int, length_effect: float, quality: float, seed: int = 1):
    """Preferences of a judge who likes long answers, for a model that writes long ones."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=n)
    model, baseline = rng.integers(600, 2400, n), rng.integers(300, 1500, n)
    difference = (baseline - model) / np.std(baseline - model, ddof=1)
    z = length_effect * np.tanh(difference) + 0.3 * difficulty + quality
    preference = (rng.random(n) < sigmoid(z)).astype(float)
    gamed_difference = np.concatenate([np.full(n, -0.8), np.full(n, 0.8)])
    gamed_difficulty = np.tile(difficulty, 2)
    gamed_z = length_effect * np.tanh(gamed_difference) + 0.0 * gamed_difficulty
    gamed = Gamed(
        (rng.random(2 * n) < sigmoid(gamed_z)).astype(float),
        gamed_difference,
        np.tile(np.arange(n), 2),
        gamed_difficulty,
    )
    return preference, model, baseline, gamed, difficulty


def test_a_win_rate_that_length_bought_is_given_back():
    preference, model, baseline, gamed, difficulty = annotated(800, -2.0, quality=0.4)
    raw = preference.mean()
    controlled = length_controlled(preference, model, baseline, gamed)
    want = sigmoid(0.3 * difficulty + 0.4).mean()
    assert raw - want > 0.1
    assert controlled.mean() == pytest.approx(want, abs=0.04)
    assert controlled.std() > 0.01, "instructions differ in difficulty"


def test_without_a_verdict_an_instruction_still_has_a_prediction():
    preference, model, baseline, gamed, _ = annotated(200, -1.0, quality=0.2)
    preference[:20] = np.nan
    assert np.isfinite(length_controlled(preference, model, baseline, gamed)).all()


def test_df_gamed_is_read_and_another_file_is_refused(tmp_path):
    file = tmp_path / "df_gamed.csv"
    file.write_text(
        "model,preference,std_delta_len,index,instruction_difficulty,not_gamed_baseline\n"
        "long,0.25,-1.5,0,0.7,False\nshort,,1.5,0,0.7,False\n"
    )
    gamed = read_gamed(file)
    assert gamed.preference[0] == 0.25
    assert np.isnan(gamed.preference[1])
    assert (gamed.instruction.tolist(), gamed.difficulty.tolist()) == ([0, 0], [0.7, 0.7])
    with pytest.raises(FasttrError, match="no difficulty of some of 2 instructions"):
        length_controlled([1.0, 0.0], [3, 9], [4, 5], gamed)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(FasttrError, match="wanted AlpacaEval's df_gamed"):
        read_gamed(file)
