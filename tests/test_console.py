"""What a person reads while a command runs: counts, times, and how far a long piece of work is."""

from __future__ import annotations

import pytest

from fasttr import console
from fasttr.console import Progress, counted, duration, shortened, silent


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (190, "3m10s"),
        (3720, "1h02m"),
        (183600, "2d03h"),
        (3599.7, "1h00m"),
    ],
)
def test_a_duration_is_short_and_whole(seconds, text):
    assert duration(seconds) == text


def test_counts():
    assert [counted(n, "step") for n in (0, 1, 2500)] == ["0 steps", "1 step", "2,500 steps"]
    assert [shortened(n) for n in (950, 12345, 1.2e6, 3e9)] == ["950", "12.3k", "1.2M", "3.0G"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress_lines(capsys, seconds_of_updates: list[float], total: int) -> list[str]:
    """What a work of `total` rows says whose rows are done at those times."""
    clock = Clock()
    with Progress("scoring", total, "row", hides_bar=True, clock=clock) as progress:
        for now in seconds_of_updates:
            clock.now = now
            progress.update()
    return capsys.readouterr().out.splitlines()


def test_progress_in_a_file_is_a_line_after_ten_seconds_and_one_a_minute(capsys):
    said = progress_lines(capsys, [5, 9, 12, 20, 60, 73, 100, 132], total=20)
    assert said == [
        "scoring: 3 of 20 rows, 12s<1m08s",
        "scoring: 6 of 20 rows, 1m13s<2m50s",
    ]


def test_a_short_piece_of_work_says_nothing(capsys):
    assert progress_lines(capsys, [1, 2, 3], total=3) == []


def test_of_several_processes_one_tells_of_progress(capsys):
    with silent(True):
        assert progress_lines(capsys, [30, 200], total=9) == []


def test_a_terminal_has_a_bar_in_place_of_lines(capsys, monkeypatch):
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True, raising=False)
    clock = Clock()
    with Progress("scoring", 4, "row", clock=clock) as progress:
        clock.now = 99.0
        progress.update(3)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "scoring" in shown.err
