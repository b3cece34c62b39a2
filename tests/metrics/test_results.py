"""Numbers of rows, and how two runs differ on the same rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fasttr.errors import FasttrError
from fasttr.metrics.results import (
    Results,
    estimate,
    paired_difference,
    read_results,
    write_results,
)


def measured(values, rows="rows of the test") -> Results:
    return Results("gold", "gold reward", rows, values, step=7)


def test_an_estimate_is_the_mean_with_its_standard_error():
    found = estimate([1.0, 2.0, 4.0, 9.0])
    assert (found.mean, found.n) == (4.0, 4)
    spread = math.sqrt((9 + 4 + 0 + 25) / 3)
    assert found.stderr == pytest.approx(spread / 2)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * spread / 2)


def test_pairing_removes_what_rows_have_in_common():
    rng = np.random.default_rng(0)
    of_rows, own = rng.normal(size=400) * 10, rng.normal(size=400) * 0.1
    first, second = measured((of_rows + 0.2 + own).tolist()), measured(of_rows.tolist())
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(0.2, abs=0.02)
    assert found.stderr == pytest.approx(0.1 / 20, rel=0.2)
    assert estimate(first.values).stderr > 50 * found.stderr


def test_other_rows_cannot_be_paired():
    with pytest.raises(FasttrError, match="gold reward: measured on other rows"):
        paired_difference(measured([1.0, 2.0]), measured([1.0, 2.0], rows="others"))


def test_results_are_read_as_they_were_written(tmp_path):
    write_results(tmp_path, measured([0.25, True, -1e-3]))
    (found,) = read_results(tmp_path).values()
    assert found == measured([0.25, 1.0, -0.001])


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "odd.json").write_text('{"x": 1}')
    with pytest.raises(FasttrError, match=r"odd\.json: cannot be read as results"):
        read_results(tmp_path)
