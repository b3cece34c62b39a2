"""What a person reads while a command runs."""

from __future__ import annotations

from tqdm import tqdm


def say(line: str = "") -> None:
    """A line on standard output that does not tear a progress bar."""
    tqdm.write(line)
