"""One part, run: `python -m bench.gpu.process NAME STATE CODE` is its own process."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu.notes import (
    CUT,
    FAILED,
    PASSED,
    RUNNING,
    Notes,
    Task,
    line_path,
    python_path,
    read_line,
    write_line,
)
from bench.gpu.plan import BY_NAME, Part
from fasttr.environment import device_for
from fasttr.errors import first_line

ROOT = Path(__file__).resolve().parents[2]
# What cuBLAS must find when it is first used, to repeat bit for bit where that is asked for.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


class Launch(NamedTuple):
    """How parts are started."""

    state: Path
    code: str  # digest of what is measured
    dry: bool


def run_here(part: Part, launch: Launch) -> None:
    """Run a part in this process; whatever happens stands in its line."""
    device = device_for(use_cpu=launch.dry)
    out = launch.state / part.name
    out.mkdir(parents=True, exist_ok=True)
    notes = Notes(
        line_path(launch.state, part.name),
        part.name,
        code=launch.code,
        device=device,
        dry=launch.dry,
    )
    module, _, function = part.run.partition(":")
    try:
        run = getattr(importlib.import_module(f"bench.gpu.{module}"), function)
        run(Task(device, launch.dry, out, notes))
    except Exception as error:
        traceback.print_exc()
        notes.close(FAILED, f"{type(error).__name__}: {first_line(error)}")
        return
    failed = [check["what"] for check in notes.line["checks"] if not check["passed"]]
    notes.close(FAILED if failed else PASSED, "; ".join(failed))


def run_apart(part: Part, launch: Launch, limit: float) -> None:
    """Run a part in a process of its own, and kill it with all that it started at its limit."""
    out = launch.state / part.name
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "bench.gpu.process", part.name, str(launch.state)]
    command += [launch.code, *(["--dry"] if launch.dry else [])]
    line_path(launch.state, part.name).unlink(missing_ok=True)
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": python_path(ROOT)},
            start_new_session=True,
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    _close_line(part, launch, process.returncode, time.monotonic() - began)


def _close_line(part: Part, launch: Launch, status: int, seconds: float) -> None:
    """Say of a part that did not close its line itself how it ended."""
    line = read_line(launch.state, part.name)
    if line is None:
        notes = Notes(
            line_path(launch.state, part.name),
            part.name,
            code=launch.code,
            device=device_for(use_cpu=launch.dry),
            dry=launch.dry,
        )
        line = notes.line
    if line["status"] != RUNNING:
        return
    was_killed = status == -signal.SIGKILL
    line["status"] = CUT if was_killed else FAILED
    line["reason"] = f"ended with status {status} after {seconds:.0f} s"
    line["seconds"] = round(seconds, 2)
    write_line(launch.state, line)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    name, state, code = sys.argv[1:4]
    run_here(BY_NAME[name], Launch(Path(state), code, dry="--dry" in sys.argv[4:]))
