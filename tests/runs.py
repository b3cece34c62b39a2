"""How the tests start runs and read what they wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fasttr import Callback, TrainConfig, train
from fasttr.cli import main

LOG2 = math.log(2)


def settings(workspace: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A short CPU run that logs every step and saves nothing but the final model."""
    return {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "train.jsonl"),
        "output_dir": str(output_dir),
        "max_steps": 6,
        "train_batch_size": 4,
        "learning_rate": 3e-3,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **changes,
    }


def run(workspace: Path, output_dir: Path, **changes: Any):
    return train(TrainConfig(**settings(workspace, output_dir, **changes)))


class Asks(Callback):
    """Asks for something after a step."""

    def __init__(self, request: str, at: int, may_evaluate: bool = False):
        self.request = request
        self.at = at
        self.may_evaluate = may_evaluate

    def on_step(self, run: Any, metrics: Any) -> None:
        if run.step == self.at:
            run.ask(self.request)


class FirstRollout(Callback):
    """Keeps what a run on rollouts makes of its first one, before any step."""

    def on_train_begin(self, run: Any) -> None:
        rows = run.plan.of_rollout(0)
        self.prompts = [run.plan.trees.raw[row] for row in rows]
        self.experience = run.collector.collect(0)


def stopped_run(workspace: Path, output_dir: Path, at: int, **changes: Any) -> Path:
    """The folder of a run that a callback stopped after a step, as if it were still under way."""
    values = settings(workspace, output_dir, **changes)
    train(TrainConfig(**values), callbacks=[Asks("stop", at)])
    (output_dir / "model.safetensors").unlink()
    return output_dir


def flags(values: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in values.items()
    ]


def error_line(capsys: Any, args: list[str]) -> str:
    """The error of a command that fails: one line on standard error, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("fasttr: error: ")
    return error[0].removeprefix("fasttr: error: ")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(output_dir: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics."""
    return read_rows(output_dir / "metrics.jsonl")


def steps(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of training steps."""
    return [line for line in lines(output_dir) if "grad_norm" in line]


def evaluations(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(output_dir) if "eval_loss" in line]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock or the machine."""
    of_the_clock = ("perf/", "memory/", "train_runtime", "train_pairs")
    return {key: value for key, value in line.items() if not key.startswith(of_the_clock)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Bit for bit."""
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def assert_same_run(a: Path, b: Path) -> None:
    """Final weights bit for bit, and every line of metrics but for the clock."""
    assert same_weights(a, b)
    assert [timeless(line) for line in lines(a)] == [timeless(line) for line in lines(b)]


def assert_resumed(a: Path, b: Path) -> None:
    """Likewise, where one began in the middle: the mean loss of its steps is left out."""
    assert same_weights(a, b)
    kept = [
        [timeless(line) for line in lines(folder) if "train_loss" not in line] for folder in (a, b)
    ]
    assert kept[0] == kept[1]


def checkpoint_names(output_dir: Path) -> list[str]:
    """Names of the checkpoints, oldest first."""
    found = output_dir.glob("checkpoint-*")
    return sorted((path.name for path in found), key=lambda name: int(name.split("-")[1]))
