"""metrics.jsonl: one object a line with its `step`, unrounded, and the trackers beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasttr.files import write_text
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
        path = output_dir / FILE
        write_text(path, _kept_lines(path, keep_until))
        self._file = path.open("a", buffering=1)
        self._trackers = Trackers(
            trackers, output_dir, keep_until=keep_until, settings=settings or {}
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._trackers.log(step, values)

    def close(self) -> None:
        self._file.close()
        self._trackers.close()


def _kept_lines(path: Path, keep_until: int | None) -> str:
    if keep_until is None or not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        step = _step_of(line)
        if step is None:
            break  # torn by a kill in mid-write: nothing after it can be older
        if step <= keep_until:
            kept.append(line + "\n")
    return "".join(kept)


def _step_of(line: str) -> int | None:
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = values.get("step") if isinstance(values, dict) else None
    return step if isinstance(step, int) else None
