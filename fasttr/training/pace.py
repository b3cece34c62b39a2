"""How long a run has taken, and how long it will."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Time since the loop began, and what is left at the speed of its steps.

    What comes before the first step, such as scoring all rows by a reference that never moves,
    happens once and is no part of the speed; scoring between steps comes again and is.
    """

    def __init__(self, step: int, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._began_at = clock()
        self._began_step = step
        self._first_step_at: float | None = None
        self._has_lines = False

    def step_begins(self) -> None:
        if self._first_step_at is None:
            self._first_step_at = self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return self._clock() - self._began_at

    def left(self, step: int, total_steps: int) -> float:
        """Seconds from `step` to the end."""
        done = step - self._began_step
        if self._first_step_at is None or done == 0:
            return 0.0
        return (self._clock() - self._first_step_at) / done * (total_steps - step)

    def is_first_line(self) -> bool:
        """Whether this is the first call."""
        is_first = not self._has_lines
        self._has_lines = True
        return is_first
