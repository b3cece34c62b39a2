"""All benchmarks within a budget of time, the most valuable first; what is done when the time is up
is kept.

python -m bench all --budget 9m --out runs/bench
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import report
from bench.timing import header

ROOT = Path(__file__).resolve().parents[1]
SHORTEST = 5.0  # seconds that are worth starting a benchmark for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=seconds, default=240.0, help="such as 9m, 240s or 1h")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--data", help="preference file of `peers`; none: generated pairs")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument(
        "--tiny", action="store_true", help="toy sizes: a check that everything runs"
    )


def seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        return float(text) if unit is None else float(text[:-1]) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; wanted a time such as 9m, 240s or 1h"
        ) from None


def plan(args: argparse.Namespace) -> list[tuple[str, float, list[str]]]:
    """(folder, share of what is left of the budget, arguments), the most valuable first."""
    gpu = torch.cuda.is_available() and not args.cpu
    data = ["--data", args.data] if args.data else []
    named = Path(args.data).parent.name if args.data else "generated"
    if args.tiny:
        brief = ["--seconds", "0.2"]
        return [
            ("lerp", 0.9, ["lerp", "--models", "tiny", *brief]),
            ("head", 0.9, ["head", "--shapes", "tiny", "--tokens", "64", *brief]),
            ("step", 0.6, ["step", "--lengths", "tiny", "--size", "tiny", "--pairs", "4", *brief]),
            (
                f"peers-{named}",
                0.9,
                ["peers", *data, "--size", "tiny", "--steps", "3", "--batch", "4"],
            ),
            ("overhead", 1.0, ["overhead", "--steps", "6", "--rows", "0"]),
        ]
    if gpu:
        return [
            (
                "head",
                0.4,
                [
                    "head",
                    "--shapes",
                    "llama-3-8b,llama-3.2-1b,qwen2.5-0.5b,qwen3-8b,pythia-2.8b",
                    "--tokens",
                    "8192,2048,16384,4096",
                    "--seconds",
                    "1.5",
                ],
            ),
            (
                "lerp",
                0.2,
                ["lerp", "--models", "llama-3.2-1b,llama-3-8b,qwen2.5-0.5b", "--seconds", "2"],
            ),
            ("step", 0.5, ["step", "--seconds", "15"]),
            (
                f"peers-{named}",
                0.7,
                ["peers", *data, "--size", "1b", "--batch", "64", "--steps", "6"],
            ),
            ("overhead", 1.0, ["overhead"]),
        ]
    return [
        (f"peers-{named}", 0.5, ["peers", *data, "--steps", "6"]),
        ("head", 0.4, ["head", "--tokens", "1024", "--seconds", "4"]),
        ("lerp", 0.3, ["lerp", "--seconds", "2"]),
        ("step", 0.7, ["step", "--pairs", "8", "--seconds", "4", "--least", "2"]),
        ("overhead", 1.0, ["overhead", "--rows", "20000"]),
    ]


def main(args: argparse.Namespace) -> None:
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.budget
    (out / "environment.json").write_text(
        json.dumps(header("python -m bench " + " ".join(sys.argv[1:])), indent=1)
    )
    notes = [_device_line(args)]
    for folder, share, arguments in plan(args):
        left = until - time.monotonic()
        if left < SHORTEST:
            notes.append(f"- {folder}: not started, the budget was spent")
        else:
            notes.append(f"- {folder}: {_run(arguments, out / folder, left, share, args.cpu)}")
        report.write(out, notes)
    print((out / "report.md").read_text())
    print(f"report, plots and JSON in {out}")


def _run(arguments: list[str], out: Path, left: float, share: float, cpu: bool) -> str:
    """Run one benchmark in a process; say how it ended. Each writes its JSON case by case, so a cut
    keeps the rest."""
    limit = max(share * left, SHORTEST)
    out.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    flags = ["--cpu"] if cpu and arguments[0] != "overhead" else []
    command = [sys.executable, "-m", "bench", *arguments, "--out", str(out), *flags]
    began = time.monotonic()
    with (out / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=limit)
        except BaseException as error:
            # The whole session, because providers run in processes of their own.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"cut off after {limit:.0f} s; what it had finished is below"
    took = f"{time.monotonic() - began:.0f} s"
    if status:
        tail = (out / "log.txt").read_text().strip().splitlines()[-1:]
        return f"failed after {took}: {''.join(tail)}"
    return f"done in {took}"


def _device_line(args: argparse.Namespace) -> str:
    facts = header("")
    devices = [] if args.cpu else facts["devices"]
    machine = devices[0]["name"] if devices else f"{facts['cpu_count']}-core CPU"
    return (
        f"{machine}, driver {facts['driver']}, torch {facts['versions']['torch']}, triton "
        f"{facts['versions']['triton']}, commit {facts['git_commit']}, {facts['time']}\n"
    )
