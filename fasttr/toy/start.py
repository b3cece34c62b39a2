"""The initial policy of what runs on the generated task: a small Llama, one token a byte, fitted to
rows of the task."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.models.scratch import init_model
from fasttr.training.loop import train

# Of every run of a model this small.
COMMON: dict[str, Any] = {
    "gradient_checkpointing": False,
    "max_length": 128,
    "use_cpu": True,
    "bf16": False,
}


def supervised_start(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    steps: int,
    *,
    width: int = 96,
    seed: int = 0,
    disable_tqdm: bool = False,
) -> Path:
    """The folder of a model that is fitted to rows (columns `prompt` and `completion`) for so many
    steps. It is complete or not there: one that is there stays, one that was stopped goes on."""
    if folder.exists():
        return folder
    making = folder.with_name(f"{folder.name}-making")
    untrained, trained = making / "untrained", making / "trained"
    if not untrained.exists():
        init_model(
            "llama",
            hidden_size=width,
            num_layers=2,
            num_heads=4,
            output_dir=str(untrained),
            seed=seed,
        )
    config = TrainConfig(
        model_name_or_path=str(untrained),
        output_dir=str(trained),
        loss_type="sft",
        max_steps=steps,
        train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        save_strategy="no",
        seed=seed,
        logging_steps=50,
        disable_tqdm=disable_tqdm,
        **going_on(trained),
        **COMMON,
    )
    train(config, train_dataset=list(rows))
    trained.rename(folder)
    say(f"moved to {folder}")
    shutil.rmtree(making)
    return folder


def going_on(folder: Path) -> dict[str, Any]:
    """Settings of a run that may have been begun in `folder` before."""
    return {"resume_from_checkpoint": bool(list_checkpoints(folder)), "overwrite_output_dir": True}
