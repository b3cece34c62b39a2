"""All benchmarks within a budget of time, the most valuable first; what is done when the time is up
is kept.

    python -m bench all --budget 9m --out runs/bench

The kept results beside TRL are shown first; then every table as soon as it has been measured here.
On a machine with a GPU the parts of `python -m bench gpu` are run instead.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from bench import report
from bench.gpu import runner
from bench.gpu.notes import python_path
from bench.harness import command_line, parse_seconds, parsed
from bench.tables import PEERS, RESULTS, tables_of
from bench.text import commit_of, machine_of
from bench.timing import header
from fasttr.environment import device_for
from fasttr.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SHORTEST = 5.0  # seconds that are worth starting a benchmark for
SILENCE = 15.0  # seconds after which a line says that something still runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=parse_seconds, default=240.0, help="such as 9m or 240s")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--data", help="preference file of `peers`; none: generated pairs")
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: that everything runs")


def main(args: argparse.Namespace) -> None:
    if device_for(args.cpu).type == "cuda":
        _run_gpu_parts(args)
        return
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.budget
    facts = header(command_line())
    write_json(out / "environment.json", facts)
    _say(_kept())
    _say(f"Measured here, on {machine_of(facts)}, commit {commit_of(facts)}:")
    notes = [f"{machine_of(facts)}, commit {commit_of(facts)}, {facts['time']}\n"]
    for entry in plan(args):
        left = until - time.monotonic()
        if left < SHORTEST:
            ended = "not started, the budget was spent"
        else:
            ended = run_entry(entry, out / entry.folder, limit=max(entry.share * left, SHORTEST))
        _say(f"{entry.folder}: {ended}\n")
        notes.append(f"- {entry.folder}: {ended}")
        report.write(out, notes)
    _say(f"report, plots and JSON in {args.out}; kept results of all benchmarks: bench/README.md")


def _run_gpu_parts(args: argparse.Namespace) -> None:
    gpu = parsed(runner, "--state", str(args.out / "state"), "--out", str(args.out))
    gpu.budget = args.budget
    runner.main(gpu)


class Entry(NamedTuple):
    """A benchmark of the plan; `share` of what is left of the budget is the most it may take."""

    folder: str
    share: float
    arguments: list[str]


def plan(args: argparse.Namespace) -> list[Entry]:
    """The most valuable first. The reference update is left out: what fits into a CPU's cache says
    nothing of memory."""
    data = ["--data", args.data] if args.data else []
    peers = f"peers-{Path(args.data).parent.name}" if args.data else "peers-generated"
    if args.tiny:
        brief = ["--seconds", "0.2"]
        step = ["--lengths", "tiny", "--size", "tiny", "--pairs", "4", *brief]
        return [
            Entry("head", 0.9, ["head", "--shapes", "tiny", "--tokens", "64", *brief]),
            Entry(peers, 0.9, ["peers", *data, "--size", "tiny", "--steps", "3", "--batch", "4"]),
            Entry("step", 0.6, ["step", *step]),
            Entry("overhead", 1.0, ["overhead", "--steps", "6", "--rows", "0"]),
        ]
    beside_trl = ["--steps", "4", "--providers", "fasttr,trl-default,trl-best"]
    brief_step = ["--lengths", "hh,tldr", "--pairs", "8", "--seconds", "4", "--least", "2"]
    return [
        Entry(peers, 0.7, ["peers", *data, *beside_trl]),
        Entry("step", 0.6, ["step", *brief_step]),
        Entry("head", 0.6, ["head", "--tokens", "1024", "--inputs", "peaked", "--seconds", "4"]),
        Entry("overhead", 1.0, ["overhead", "--rows", "10000"]),
    ]


def _kept() -> str:
    """The kept tables beside TRL, with what each was made with."""
    return f"Kept results, measured before:\n\n{tables_of(PEERS, RESULTS)}\n"


def run_entry(entry: Entry, out: Path, limit: float) -> str:
    """Run one benchmark in a process, show what it prints, and say how it ended. Each writes its
    JSON case by case, so a cut keeps the rest."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench", *entry.arguments, "--out", str(out), "--cpu"]
    _say(f"{entry.folder}: python -m bench {' '.join(entry.arguments)}, at most {limit:.0f} s")
    began = time.monotonic()
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONPATH": python_path(ROOT)},
            start_new_session=True,
        )
        try:
            finished = _shown(process, entry.folder, began + limit)
        finally:
            if process.poll() is None:
                # The whole session, because providers run in processes of their own.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = f"{time.monotonic() - began:.0f} s"
    if not finished:
        return f"cut off after {took}; what it had finished is in the report"
    if process.returncode:
        tail = (out / "log.txt").read_text().strip().splitlines()[-1:]
        return f"failed after {took}: {''.join(tail)}"
    return f"done in {took}"


def _shown(process: subprocess.Popen[str], name: str, until: float) -> bool:
    """Print what a process prints, and that it still runs where it is silent; whether it ended
    before `until`."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    spoke = time.monotonic()
    while (left := until - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=min(left, 1.0))
        except queue.Empty:
            if time.monotonic() - spoke > SILENCE:
                _say(f"{name}: still running, at most {left:.0f} s more")
                spoke = time.monotonic()
            continue
        if line is None:
            process.wait()
            return True
        _say(line)
        spoke = time.monotonic()
    return False


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _say(text: str) -> None:
    print(text, flush=True)
