"""Means over seeds with their intervals, in numbers and in words."""

import math

import pytest

from fasttr.toy import stats


def test_intervals_over_seeds():
    found = stats.interval([1.0, 2.0, 3.0, math.nan])
    assert (found.mean, found.n, found.sign) == (2.0, 3, 0)
    assert found.high - 2 == pytest.approx(4.303 / math.sqrt(3))
    assert stats.t975(30) == pytest.approx(2.042, abs=1e-3)
    assert stats.interval([1.0]).sign == 0
    assert "no interval" in stats.interval([1.0]).text()
    assert [
        stats.words(stats.interval(x), "up", "down", "none")[:4]
        for x in ([1, 1.1], [-1, -1.1], [-1, 1])
    ] == [
        "up (",
        "down",
        "none",
    ]
