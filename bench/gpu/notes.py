"""What a part of the plan finds out: one JSON, on disk after every entry, so that a part which is
cut keeps what it had."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu.predictions import PREDICTIONS, Predicted
from bench.timing import device_name, header
from fasttr.files import write_json

RUNNING, PASSED, FAILED, CUT = "running", "passed", "failed", "cut"


class Task(NamedTuple):
    """What a part is given."""

    device: torch.device
    dry: bool  # toy sizes on a CPU
    out: Path  # folder of the part, for files
    notes: Notes


class Notes:
    """The line of a part in gpu.jsonl."""

    def __init__(self, path: Path, part: str, *, code: str, device: torch.device, dry: bool):
        self.path = path
        self.began = time.monotonic()
        self.line: dict[str, Any] = {
            "part": part,
            "status": RUNNING,
            "reason": "",
            "seconds": 0.0,
            "code": code,
            "device": device_name(device),
            "dry": dry,
            "figures": [],
            "checks": [],
            "lacks": [],
            "files": {},
            "environment": header(f"python -m bench gpu --parts {part}"),
        }
        self._write()

    def figure(self, what: str, value: float, unit: str = "", digits: int = 3) -> None:
        """A number, beside what was predicted of it."""
        predicted: Predicted | None = PREDICTIONS.get((self.line["part"], what))
        entry: dict[str, Any] = {"what": what, "value": float(f"{value:.{digits}g}"), "unit": unit}
        if predicted is not None:
            entry["predicted"] = predicted._asdict()
        self.line["figures"].append(entry)
        self._write()

    def check(self, what: str, passed: bool, detail: str = "") -> None:
        self.line["checks"].append({"what": what, "passed": bool(passed), "detail": detail})
        self._write()

    def lacks(self, what: str) -> None:
        """Something this machine does not have, and what therefore was not measured."""
        if what not in self.line["lacks"]:
            self.line["lacks"].append(what)
            self._write()

    def keep(self, path: Path) -> None:
        """The JSON that a benchmark wrote."""
        self.line["files"][path.name] = json.loads(path.read_text())
        self._write()

    def close(self, status: str, reason: str = "") -> None:
        self.line["status"] = status
        self.line["reason"] = reason
        self._write()

    @property
    def all_passed(self) -> bool:
        return all(check["passed"] for check in self.line["checks"])

    def _write(self) -> None:
        self.line["seconds"] = round(time.monotonic() - self.began, 2)
        write_json(self.path, self.line)


def line_path(state: Path, part: str) -> Path:
    return state / f"{part}.json"


def read_line(state: Path, part: str) -> dict[str, Any] | None:
    path = line_path(state, part)
    return json.loads(path.read_text()) if path.is_file() else None


def write_line(state: Path, line: dict[str, Any]) -> None:
    write_json(line_path(state, line["part"]), line)


def is_finished(line: dict[str, Any] | None, *, code: str, device: str) -> bool:
    """Whether a part needs no second run: it passed, with this code on this device."""
    if line is None or line["status"] != PASSED:
        return False
    return line["code"] == code and line["device"] == device


def python_path(root: Path) -> str:
    """PYTHONPATH of a child: the checkout, its kernels, and what was there."""
    return os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
