"""Runs that send their own process a signal at a chosen point, for the tests of resuming. They are
forked from a server that has imported everything and computed nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # what every run would import first

import fasttr.checkpoint.folder
import fasttr.models.packed
import fasttr.training.loop
import fasttr.training.window
from fasttr import TrainConfig, train

OWNERS = {
    "step": (fasttr.training.loop, "_step"),
    "score": (fasttr.models.packed.PackedModel, "score"),
    "save": (fasttr.checkpoint.folder, "save_model"),
    "rename": (os, "rename"),
}


def signal_at(what: str, calls: int, signum: int, after: Path | None) -> None:
    """Make the named function send this process a signal when it is entered for the `calls`-th time
    since the folder `after` exists."""
    owner, name = OWNERS[what]
    original, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += after is None or after.exists()
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
