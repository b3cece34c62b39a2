"""What a person reads while a command runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tqdm import tqdm

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
