"""The trainer itself under the profiler: waits, idle time, the host's own time; and a run that is
killed and taken up."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from bench.gpu.notes import Task
from bench.gpu.small_run import Killed, SmallRun
from bench.lengths import make_trees
from bench.overhead import StepClock
from bench.profiling import read_profile
from bench.shapes import SHAPES, build
from bench.timing import synchronize
from fasttr import Callback, TrainConfig, train
from fasttr.data.in_memory import ListTrees
from fasttr.models.scratch_tokenizer import byte_tokenizer

PROFILED = (8, 10)  # steps, from after the first to after the last
PROFILE = "profile.json.gz"


def run(task: Task) -> None:
    _large_run(task)
    _killed_run(task)


class ProfileSteps(Callback):
    """Profiles the steps between two, and writes a trace that a browser shows."""

    def __init__(self, task: Task):
        self.task = task
        self.first, self.last = (1, 2) if task.dry else PROFILED
        self._profiler: Any = None

    def on_step(self, run: Any, metrics: Any) -> None:
        if run.step == self.first:
            self._begin()
        elif run.step == self.last:
            self._end()

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.task.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        synchronize(self.task.device)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()

    def _end(self) -> None:
        synchronize(self.task.device)
        self._profiler.stop()
        found = read_profile(self._profiler, self.task.device)
        steps = self.last - self.first
        notes = self.task.notes
        notes.figure("idle share", 1 - found.busy_share())
        notes.figure("waits of the host a step", found.waits / steps)
        notes.figure("kernels a step", len(found.kernels) / steps, digits=5)
        for kind, row in found.kinds().items():
            notes.figure(f"time in {kind} a step", row["ms"] / steps, "ms")
        if self.task.device.type == "cuda":
            self._profiler.export_chrome_trace(str(self.task.out / PROFILE))


def _large_run(task: Task) -> None:
    """A soft reference that moves every fourth step, pairs with the lengths of HH-RLHF."""
    shape = SHAPES["tiny" if task.dry else "llama-3.2-1b"]
    steps, pairs = (3, 4) if task.dry else (16, 64)
    trees = make_trees("tiny" if task.dry else "hh", steps * pairs, shape.vocabulary)
    folder = task.out / "run"
    clock = StepClock()
    config = TrainConfig(
        output_dir=str(folder),
        overwrite_output_dir=True,
        train_batch_size=pairs,
        max_steps=steps,
        ref_update="soft",
        ref_update_alpha=0.6,
        ref_update_every=2 if task.dry else 4,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=task.dry,
    )
    with clock.watching_compute():
        train(
            config,
            model=build(shape, task.device),
            tokenizer=byte_tokenizer(),
            train_dataset=ListTrees(trees),
            callbacks=[clock, ProfileSteps(task)],
        )
    for what, (value, unit) in clock.figures(pairs).items():
        if what.startswith("own time"):
            task.notes.figure("own host time of a step", value, unit)
    _rates(task, folder)


def _rates(task: Task, folder: Path) -> None:
    """Medians of the lines of metrics after warm-up."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "grad_norm" in line][1 if task.dry else 4 :]
    for key, unit in (("perf/pairs_per_second", "pairs/s"), ("perf/mfu", "")):
        values = sorted(line[key] for line in steps if key in line)
        if values:
            task.notes.figure(key, values[len(values) // 2], unit)
    task.notes.figure("peak", max(line["memory/peak_gib"] for line in steps), "GiB")


def _killed_run(task: Task) -> None:
    """Killed after step 5, taken up, it ends with the weights of a run that was not."""
    whole, killed = task.out / "whole", task.out / "killed"
    SmallRun(task.out, whole, task.device, steps=6).train()
    run = SmallRun(task.out, killed, task.device, steps=6)
    task.notes.check("the run was killed", _dies(run, task.dry))
    run.train(resume=True)
    same = SmallRun.weights_of(whole) == SmallRun.weights_of(killed)
    task.notes.check("killed and taken up, it ends with the same weights", same)


def _dies(run: SmallRun, in_process: bool) -> bool:
    if not in_process:
        return run.train_apart(dies_at=5) == -signal.SIGKILL
    try:
        run.train(dies_at=5)
    except Killed:
        return True
    return False
