"""What a run left in its folder, read for a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError, one_line
from fasttr.metrics.plots import read_metrics, run_names
from fasttr.metrics.results import Results, read_results
from fasttr.settings import settings_of

# They name the run and where it lies, not what it is.
PLACES = ("output_dir", "run_name", "resume_from_checkpoint", "overwrite_output_dir", "hub_token")


@dataclass(frozen=True)
class Record:
    """One run."""

    name: str
    folder: Path
    lines: list[dict[str, Any]]  # of metrics
    settings: Mapping[str, Any]  # all of them, as they were written
    facts: Mapping[str, Any]  # of run.json; empty for a run of an older version
    results: Mapping[str, Results]

    @classmethod
    def of(cls, name: str, folder: Path) -> Record:
        """FasttrError for a folder that holds no run."""
        return cls(
            name,
            folder,
            read_metrics(folder),
            _read_json(folder / "train_config.json"),
            _read_json(folder / "run.json"),
            read_results(folder),
        )

    def changed_settings(self) -> dict[str, Any]:
        """Those that are not a default of `fasttr train`."""
        known = settings_of(TrainConfig)
        return {
            name: value
            for name, value in self.settings.items()
            if name not in PLACES and (name not in known or value != known[name].default)
        }

    def last(self, key: str) -> Any:
        """The last value of a metric, or None."""
        return next((line[key] for line in reversed(self.lines) if key in line), None)

    def samples(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(step, samples of the same prompts)."""
        for line in self.lines:
            if line.get("event") == "completions":
                yield line["step"], line["completions"]

    @property
    def is_finished(self) -> bool:
        return any("train_runtime" in line for line in self.lines)


def read_records(folders: Sequence[str | Path]) -> list[Record]:
    return [Record.of(name, folder) for name, folder in run_names(folders).items()]


def differing_settings(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Name of a setting -> its value in each run, where they are not all the same."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    found = {}
    for name in names:
        values = [record.settings.get(name) for record in records]
        if name not in PLACES and any(value != values[0] for value in values):
            found[name] = values
    return found


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FasttrError(f"{path} cannot be read: {one_line(error)}") from error
