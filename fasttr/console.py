"""What a person reads while a command runs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

FIRST_LINE, LATER_LINES = 10.0, 60.0  # seconds between lines of progress

_silences: list[bool] = []


def say(line: str = "") -> None:
    """A line on standard output that does not tear a progress bar."""
    if not any(_silences):
        tqdm.write(line)


@contextlib.contextmanager
def silent(on: bool) -> Iterator[None]:
    """Within, nothing is said where `on`: of several processes one speaks for all."""
    _silences.append(on)
    try:
        yield
    finally:
        _silences.pop()


def counted(count: int, thing: str) -> str:
    """`1 step`, `5 steps`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def duration(seconds: float) -> str:
    """`45s`, `3m10s`, `1h02m`, `2d03h`."""
    whole = max(round(seconds), 0)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def shortened(count: float) -> str:
    """`950`, `12.3k`, `1.2M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"


class Progress:
    """How far a long piece of work is: a bar on a terminal; in a file of output, or where bars are
    not wanted, a line after ten seconds and one a minute.

    Args:
        what: such as `scoring the reference`.
        total: how much there is of it.
        unit: of what, such as `row`.
        hides_bar: lines in place of a bar.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        hides_bar: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._what, self._total, self._unit = what, total, unit
        self._clock = clock
        self._began = clock()
        self._next_line = self._began + FIRST_LINE
        self._done = 0.0
        self._bar: Any = None
        if not hides_bar and not any(_silences) and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: float = 1) -> None:
        """So much more is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._clock() >= self._next_line:
            self._next_line = self._clock() + LATER_LINES
            self._say()

    def _say(self) -> None:
        elapsed = self._clock() - self._began
        left = elapsed * max(self._total / max(self._done, 1e-9) - 1, 0)
        say(
            f"{self._what}: {min(round(self._done), self._total):,} of "
            f"{counted(self._total, self._unit)}, {duration(elapsed)}<{duration(left)}"
        )
