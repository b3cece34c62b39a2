"""Runs that are cut off: by a signal that they send their own process at a chosen point, in a child
that is forked from a server that has imported everything and computed nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # what every run would import first

import fasttr.checkpoint.folder
import fasttr.models.packed
import fasttr.training.loop
import fasttr.training.window
from fasttr import TrainConfig, train
from fasttr.checkpoint.folder import step_of

# Saves every 2 steps, windows of 4 and evaluations every 3: now together, now apart.
RESUMABLE = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 8,
    "logging_steps": 3,
    "ref_update_every": 4,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "max_tokens_per_batch": 100,
}


def resumable(workspace: Path, ref_update: str, **changes: Any) -> dict[str, Any]:
    """What a run that is cut off has beside the settings of any run."""
    evaluated = {"eval_dataset_name": str(workspace / "test.jsonl")}
    return {**RESUMABLE, **evaluated, "ref_update": ref_update, **changes}


class Point(NamedTuple):
    """A function that a run passes through; only calls that `counts` says count."""

    owner: Any
    name: str
    counts: Callable[..., bool] = lambda *args, **kwargs: True


def _becomes_a_checkpoint(aside: Any, target: Any) -> bool:
    return step_of(Path(target)) is not None


POINTS = {
    "step": Point(fasttr.training.loop, "train_step"),
    "score": Point(fasttr.models.packed.PackedModel, "logps"),
    "save": Point(fasttr.checkpoint.folder, "save_model"),
    "rename": Point(os, "replace", _becomes_a_checkpoint),
    "write": Point(safetensors.torch, "save_file"),  # by every rank, of divided weights
}


def signal_at(what: str, calls: int, signum: int, after: Path | None) -> None:
    """Make the named function send this process a signal when it is entered for the `calls`-th time
    since the folder `after` exists."""
    owner, name, counts = POINTS[what]
    original = getattr(owner, name)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        if counts(*args, **kwargs) and (after is None or after.exists()):
            count += 1
            if count == calls:
                os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def signalled_run(
    settings: dict[str, Any], what: str, calls: int, signum: int, output: Path, after: Path | None
) -> None:
    """The target of a child process: a run that gets `signum` at a point, its output in a file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115  # lives as long as the process
    torch.set_num_threads(1)
    fasttr.training.window.PARTIAL_SECONDS = 0.0  # save the sweep after every pack
    signal_at(what, calls, signum, after)
    train(TrainConfig(**settings))
