"""How the tests start runs and read what they wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fasttr import TrainConfig, train


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


def lines(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def steps(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of training steps."""
    return [line for line in lines(output_dir) if "grad_norm" in line]


def evaluations(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in lines(output_dir) if "eval_loss" in line]


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock or the machine."""
    return {
        k: v
        for k, v in line.items()
        if not k.startswith(("perf/", "memory/", "train_runtime", "train_pairs"))
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Bit for bit."""
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


LOG2 = math.log(2)
