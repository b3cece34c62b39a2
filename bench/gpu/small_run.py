"""A short run of the trainer on a tiny model: what repeats, and what survives a kill, is shown on
it.

`python -m bench.gpu.small_run '{...}'` is one such run as a process of its own, which can be
killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.gpu.notes import python_path
from bench.gpu.process import ROOT
from bench.pairs import generated_file, model_folder
from fasttr import Callback, TrainConfig, train

PAIRS = 8  # of a step
SAVE_EVERY = 2


class Killed(BaseException):
    """In place of SIGKILL, where the run shares its process with others."""


class Death(Callback):
    """Ends the process without a word after a step."""

    def __init__(self, step: int, in_process: bool):
        self.step = step
        self.in_process = in_process

    def on_step(self, run: Any, metrics: Any) -> None:
        if run.step != self.step:
            return
        if self.in_process:
            raise Killed
        os.kill(os.getpid(), signal.SIGKILL)


class SmallRun:
    """A run with a soft reference on generated pairs."""

    def __init__(self, shared: Path, folder: Path, device: torch.device, steps: int):
        self.shared = shared
        self.folder = folder
        self.device = device
        self.steps = steps

    def train(self, *, resume: bool = False, dies_at: int = 0, in_process: bool = True) -> None:
        data = generated_file(self.shared / "generated.jsonl", 8 * PAIRS)
        config = TrainConfig(
            model_name_or_path=str(model_folder(self.shared, "tiny", data)),
            output_dir=str(self.folder),
            overwrite_output_dir=not resume,
            resume_from_checkpoint=resume or None,
            train_batch_size=PAIRS,
            max_steps=self.steps,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="steps",
            save_steps=SAVE_EVERY,
            ref_update="soft",
            ref_update_alpha=0.5,
            ref_update_every=2,
            full_determinism=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            use_cpu=self.device.type == "cpu",
        )
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        callbacks = [Death(dies_at, in_process)] if dies_at else []
        try:
            train(config, train_dataset=rows, callbacks=callbacks)
        finally:
            torch.use_deterministic_algorithms(False)

    def train_apart(self, **how: Any) -> int:
        """In a process of its own; its exit status."""
        spec = {
            "shared": str(self.shared),
            "folder": str(self.folder),
            "device": self.device.type,
            "steps": self.steps,
            "how": {"in_process": False, **how},
        }
        command = [sys.executable, "-m", "bench.gpu.small_run", json.dumps(spec)]
        environment = os.environ | {"PYTHONPATH": python_path(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode

    @staticmethod
    def weights_of(folder: Path) -> bytes:
        return (folder / "model.safetensors").read_bytes()


def main() -> None:
    spec = json.loads(sys.argv[1])
    run = SmallRun(
        Path(spec["shared"]), Path(spec["folder"]), torch.device(spec["device"]), spec["steps"]
    )
    run.train(**spec["how"])


if __name__ == "__main__":
    main()
