"""Faults of ranks at random moments: each time the run ends within a minute and, resumed, is the
uninterrupted one bit for bit.

python -m tests.storm --faults 40    # prints a line a fault; about 20 seconds of a free core each
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.conftest import make_workspace
from tests.distributed.cases import trained
from tests.runs import lines, settings, timeless
from tests.several import ALL, PATIENCE, Fault, launched

WORLD = 2
RUN = {
    "train_batch_size": 8,
    "max_tokens_per_batch": 100,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "ref_update_every": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
}
# How often a run of these settings passes each point, about; by how its weights lie.
PASSES = {
    "whole": {"step": 8, "score": 24, "save": 5, "rename": 4},
    "divided": {"step": 8, "score": 24, "write": 12, "rename": 4},
}
SHARD_SIZE = {"whole": 1, "divided": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=int, default=PATIENCE, help="seconds; a busy machine's")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    workspace = make_workspace(folder / "workspace")
    kinds = [(update, lie) for update in ("none", "soft", "hard") for lie in PASSES]
    uninterrupted: dict[tuple[str, str], Path] = {}
    missed = 0
    for number in range(options.faults):
        kind = rng.choice(kinds)
        if kind not in uninterrupted:
            uninterrupted[kind] = folder / f"whole-{'-'.join(kind)}"
            run_of_ranks(workspace, uninterrupted[kind], kind, patience=options.patience)
        fault = random_fault(rng, kind[1])
        began = time.perf_counter()
        output = folder / f"run-{number}"
        statuses = run_of_ranks(workspace, output, kind, fault, patience=options.patience)
        seconds = time.perf_counter() - began
        missed += statuses == [0] * WORLD
        # A run that had come to its end has nothing to do here.
        resumed = run_of_ranks(workspace, output, kind, resume_from_checkpoint=True)
        assert resumed == [0] * WORLD, (fault, resumed)
        assert_same(output, uninterrupted[kind], fault)
        named = f"{kind[0]:4} {kind[1]:7} {fault.named()}"
        print(f"{number + 1:3} {named}: statuses {statuses}, {seconds:.0f} s", flush=True)
        shutil.rmtree(output)
    shutil.rmtree(folder)
    print(f"{options.faults} faults, {missed} that came too late; every run resumed bit for bit")


def assert_same(output: Path, whole: Path, fault: Fault) -> None:
    mine, theirs = trained(output), trained(whole)
    assert mine.keys() == theirs.keys(), fault
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs), fault
    expected = [timeless(line) for line in lines(whole)]
    assert [timeless(line) for line in lines(output)] == expected, fault


def run_of_ranks(
    workspace: Path,
    output: Path,
    kind: tuple[str, str],
    fault: Fault | None = None,
    patience: int = PATIENCE,
    **more: Any,
) -> list[int | None]:
    """The exit statuses of a launch."""
    evaluated = {
        "eval_dataset_name": str(workspace / "test.jsonl"),
        "ref_update": kind[0],
        "shard_size": SHARD_SIZE[kind[1]],
    }
    changes = settings(workspace, output, **{**RUN, **evaluated, **more})
    ended = launched(WORLD, [changes], output.with_suffix(".output"), fault, patience)
    return [rank.status for rank in ended]


def random_fault(rng: random.Random, lie: str) -> Fault:
    disk, write = ("disk", "save") if lie == "whole" else ("file", "write")
    kind = rng.choice(["kill", "kill", "terminate", "nan", "error", disk])
    rank = rng.choice([0, 1, ALL])
    what = rng.choice(list(PASSES[lie]))
    if what in ("save", "rename") or kind == "disk":
        rank = 0  # the rank that writes
    calls = rng.randint(1, PASSES[lie][write if kind == disk else what])
    if kind == "kill":
        return Fault(rank, "signal", what, calls, signal.SIGKILL)
    if kind == "terminate":
        return Fault(rank, "signal", what, calls, signal.SIGTERM)
    return Fault(rank, kind, what, calls)


if __name__ == "__main__":
    main()
