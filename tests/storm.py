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

from tests.conftest import make_workspace
from tests.runs import lines, same_weights, settings, timeless
from tests.several import ALL, Fault, launched

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
# How often a run of these settings passes each point, about.
PASSES = {"step": 8, "score": 24, "save": 5, "rename": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    workspace = make_workspace(folder / "workspace")
    whole = {}
    for update in ("none", "soft", "hard"):
        whole[update] = folder / f"whole-{update}"
        run_of_ranks(workspace, whole[update], update)
    missed = 0
    for number in range(options.faults):
        update = rng.choice(list(whole))
        fault = random_fault(rng)
        began = time.perf_counter()
        output = folder / f"run-{number}"
        statuses = run_of_ranks(workspace, output, update, fault)
        seconds = time.perf_counter() - began
        missed += statuses == [0] * WORLD
        # A run that had come to its end has nothing to do here.
        resumed = run_of_ranks(workspace, output, update, resume_from_checkpoint=True)
        assert resumed == [0] * WORLD, (fault, resumed)
        assert same_weights(output, whole[update]), fault
        expected = [timeless(line) for line in lines(whole[update])]
        assert [timeless(line) for line in lines(output)] == expected, fault
        print(f"{number + 1:3} {update:4} {fault.named()}: statuses {statuses}, {seconds:.0f} s")
        shutil.rmtree(output)
    shutil.rmtree(folder)
    print(f"{options.faults} faults, {missed} that came too late; every run resumed bit for bit")


def run_of_ranks(
    workspace: Path, output: Path, update: str, fault: Fault | None = None, **more: Any
) -> list[int | None]:
    """The exit statuses of a launch."""
    evaluated = {"eval_dataset_name": str(workspace / "test.jsonl"), "ref_update": update}
    changes = settings(workspace, output, **{**RUN, **evaluated, **more})
    ended = launched(WORLD, [changes], output.with_suffix(".output"), fault)
    return [rank.status for rank in ended]


def random_fault(rng: random.Random) -> Fault:
    kind = rng.choice(["kill", "kill", "terminate", "nan", "error", "disk"])
    rank = rng.choice([0, 1, ALL])
    what = rng.choice(list(PASSES))
    if what in ("save", "rename") or kind == "disk":
        rank = 0  # the rank that writes
    calls = rng.randint(1, PASSES["save" if kind == "disk" else what])
    if kind == "kill":
        return Fault(rank, "signal", what, calls, signal.SIGKILL)
    if kind == "terminate":
        return Fault(rank, "signal", what, calls, signal.SIGTERM)
    return Fault(rank, kind, what, calls)


if __name__ == "__main__":
    main()
