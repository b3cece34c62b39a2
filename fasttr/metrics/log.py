"""metrics.jsonl: one object a line with its `step`, unrounded, and the trackers beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttr.errors import FasttrError, one_line
from fasttr.files import is_full_disk, write_text
from fasttr.metrics.trackers import TrackerConfig, Trackers

FILE = "metrics.jsonl"


class MetricsLog:
    """Where a run's lines of metrics go.

    Args:
        output_dir: folder of the run.
        trackers: what else takes the numbers.
        keep_until: the step that a run resumes from; later lines, and a torn last one, are cut off.
        settings: shown with the run by the trackers.
    """

    def __init__(
        self,
        output_dir: Path,
        trackers: TrackerConfig,
        *,
        keep_until: int | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self._path = output_dir / FILE
        with _disk_errors(self._path):
            write_text(self._path, _kept_lines(self._path, keep_until))
        self._trackers = Trackers(
            trackers, output_dir, keep_until=keep_until, settings=settings or {}
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        # Opened for each line: what a full disk did not take is not kept for a later attempt.
        with _disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._trackers.log(step, values)

    def close(self) -> None:
        self._trackers.close()


def last_line(output_dir: Path) -> dict[str, Any]:
    """The last line of a run's metrics; empty where there is none, or none that can be read."""
    path = output_dir / FILE
    lines = _lines(path) if path.is_file() else []
    return lines[-1] if lines and lines[-1] is not None else {}


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """An error of writing becomes one line."""
    try:
        yield
    except OSError as error:
        remedy = "; free some space and resume" if is_full_disk(error) else ""
        raise FasttrError(f"cannot write {path}: {one_line(error)}{remedy}") from error


class NoLog:
    """Takes lines and writes none: of several processes one writes for all."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _kept_lines(path: Path, keep_until: int | None) -> str:
    if keep_until is None or not path.exists():
        return ""
    kept = []
    for values in _lines(path):
        if values is None:
            break  # torn by a kill in mid-write: nothing after it can be older
        if values["step"] <= keep_until:
            kept.append(json.dumps(values) + "\n")
    return "".join(kept)


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Each line of a log, None for one that is torn or of another kind."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return [_values_of(line) for line in text.splitlines()]


def _values_of(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    is_a_line = isinstance(values, dict) and isinstance(values.get("step"), int)
    return values if is_a_line else None
