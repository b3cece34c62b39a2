"""Everything worth knowing of a GPU within minutes: ordered parts, each in a process of its own,
each with its own line of results.

    python -m bench gpu --budget 530s --state runs/gpu --out DIR
    python -m bench gpu --list
    python -m bench gpu --dry --state runs/dry --out runs/dry/out    # toy sizes on a CPU

A part that passed is not run again on the same device with the same fasttr and fasttr_kernels. The
state folder may be copied to a fresh machine, which then goes on; a gpu.jsonl of an earlier call,
put into the state folder, does as well. A part that fails prints a line and the next one goes on.
DIR gets gpu.jsonl (a line a part), report.md, log.txt, profile.json.gz and plots.tar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path

from bench.gpu import report
from bench.gpu.notes import is_finished, line_path, read_line, write_line
from bench.gpu.plan import BY_NAME, PARTS, Part
from bench.gpu.process import ROOT, Launch, run_apart, run_here
from bench.harness import parse_seconds
from bench.timing import device_name
from fasttr.environment import device_for

MARGIN = 5.0  # seconds that are left for collecting results
SPARE = 1.6  # a part is cut at so many times what it is expected to take
DRY_SECONDS = 60.0  # a part at toy sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--budget", type=parse_seconds, default=530.0, help="such as 530s or 9m")
    parser.add_argument("--state", type=Path, default=Path("runs/gpu"), help="results so far")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/out"), help="at most 8 files")
    parser.add_argument("--parts", help="only these, comma-separated")
    parser.add_argument("--again", help="parts to run although they have passed, comma-separated")
    parser.add_argument("--list", action="store_true", help="the parts and their expected seconds")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU")
    parser.add_argument(
        "--commit", help="of a copy of the tree that has lost its history; stands in the results"
    )
    parser.add_argument("--in_process", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> None:
    if args.list:
        print(listing())
        return
    state, out = args.state.resolve(), args.out.resolve()
    state.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    if args.commit:
        os.environ["BENCH_COMMIT"] = args.commit
    _keep_caches_in(state)
    take_up(state)
    launch = Launch(state, code_digest(), args.dry)
    until = time.monotonic() + args.budget - MARGIN
    for part in pending(args, launch):
        left = until - time.monotonic()
        expected = DRY_SECONDS if args.dry else part.seconds
        if expected > left:
            print(f"{part.name}: not started, {expected:.0f} s do not fit in {max(left, 0):.0f} s")
            continue
        if args.in_process:
            run_here(part, launch)
        else:
            run_apart(part, launch, min(left, SPARE * expected))
        line = read_line(state, part.name)
        assert line is not None
        print(report.one_line(line), flush=True)
        report.collect(state, out)
    report.collect(state, out)
    print(f"\n{report.summary(report.lines_of(state))}\n\nreport, lines and logs in {args.out}")


def listing() -> str:
    """The parts in their order, with what they take, show and pass by."""
    lines = [
        f"{number:>2} {part.name:<8} {part.seconds:>4.0f} s  {part.evidence}; passes: {part.passes}"
        for number, part in enumerate(PARTS)
    ]
    return "\n".join([*lines, f"   all: {sum(part.seconds for part in PARTS):.0f} s"])


def pending(args: argparse.Namespace, launch: Launch) -> list[Part]:
    """What is to be run: in order, and what has failed before after what has never been tried."""
    again = args.again.split(",") if args.again else []
    names = args.parts.split(",") if args.parts else [part.name for part in PARTS]
    unknown = sorted({*names, *again} - set(BY_NAME))
    if unknown:
        raise SystemExit(f"got {', '.join(unknown)}; wanted some of {', '.join(BY_NAME)}")
    device = device_name(device_for(use_cpu=launch.dry))
    fresh: list[Part] = []
    tried: list[Part] = []
    for part in PARTS:
        if part.name not in {*names, *again}:
            continue
        line = read_line(launch.state, part.name)
        if part.name in again or line is None:
            fresh.append(part)
        elif not is_finished(line, code=launch.code, device=device):
            tried.append(part)
    return fresh + tried


def code_digest() -> str:
    """Of everything that is measured: results of other code are not taken for this one's."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in ("fasttr", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def take_up(state: Path) -> None:
    """The lines of a gpu.jsonl that was put into the state folder."""
    path = state / "gpu.jsonl"
    if not path.is_file():
        return
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if not line_path(state, line["part"]).is_file():
            write_line(state, line)


def _keep_caches_in(state: Path) -> None:
    """What compilers make is kept with the results."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ.setdefault(name, str(state / "cache" / name.partition("_")[0].lower()))
