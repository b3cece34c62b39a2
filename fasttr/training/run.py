"""Everything a run holds, from its configuration to a state that can be saved and taken up
again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasttr.batch import PackedBatch, TreeSource
from fasttr.checkpoint import folder as checkpoint
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.losses import Loss, Sft, Weighted, group_loss
from fasttr.metrics.sums import Averages
from fasttr.models.packed import LossFn, PackedModel
from fasttr.packing.plan import Plan
from fasttr.reference.moving import MovingReference, ScoreTable
from fasttr.training.intervals import Cadence


def say(line: str = "") -> None:
    """A line on standard output that does not tear a progress bar."""
    tqdm.write(line)


@dataclass
class Run:
    """The objects of a run and the state variables that the loop updates."""

    config: TrainConfig
    device: torch.device
    bf16: bool
    tokenizer: Any
    loss: Loss | Weighted
    train_trees: TreeSource
    eval_trees: TreeSource | None
    plan: Plan
    policy: PackedModel
    reference: MovingReference
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scores: ScoreTable  # of the reference, for the rows of the current window
    eval_scores: ScoreTable | None  # of the reference, for the evaluation split
    anchor: ScoreTable | None  # of the initial policy, for the evaluation split
    averages: Averages  # since the last line of metrics
    total_loss: Tensor  # () over all steps
    resumed: bool = False
    step: int = 0  # optimizer steps done
    window_scored: bool = False
    num_tokens: int = 0
    best: tuple[float, int] | None = None  # value of the metric and step of the best checkpoint

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.config, self.plan)

    @property
    def best_checkpoint(self) -> Path | None:
        return None if self.best is None else checkpoint.folder_of(self.output_dir, self.best[1])

    def note_best(self, evaluation: dict[str, float]) -> bool:
        """Whether an evaluation makes this step the best checkpoint, and with save_strategy best
        calls for one."""
        config = self.config
        if not config.load_best_model_at_end and config.save_strategy != "best":
            return False
        if config.best_metric not in evaluation:
            known = ", ".join(key for key in evaluation if not key.endswith("stderr"))
            raise FasttrError(
                f"metric_for_best_model: {config.best_metric} is not in this evaluation; wanted of "
                f"{known}"
            )
        if config.save_strategy != "best" and not self.cadence.saves(self.step):
            return False
        value = evaluation[config.best_metric]
        better = self.best is None or (
            value > self.best[0] if config.more_is_better else value < self.best[0]
        )
        if better:
            self.best = (value, self.step)
        return better and config.save_strategy == "best"

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def chosen_tokens_means(self, trees: TreeSource, rows: np.ndarray) -> dict[int, float]:
        """By row: the mean of scored chosen tokens over the rows that `sft` averages with it: its
        group, or all."""
        if not self.reads_sft:
            return dict.fromkeys(rows.tolist(), 1.0)
        # Without a prompt the first token is not scored.
        scored = trees.completion_lengths[rows, 0] - (trees.prompt_lengths[rows] == 0)
        size = self.config.group_size or len(rows)
        means = {}
        for first in range(0, len(rows), size):
            here = slice(first, first + size)
            means.update(dict.fromkeys(rows[here].tolist(), max(float(scored[here].mean()), 1e-9)))
        return means

    @property
    def reads_sft(self) -> bool:
        parts = self.loss.losses if isinstance(self.loss, Weighted) else (self.loss,)
        return any(isinstance(part, Sft) for part in parts)

    def loss_fn(self, batch: PackedBatch, chosen_tokens_means: dict[int, float]) -> LossFn:
        """The loss of one pack, which is on the device, as the head calls it."""
        mean: Tensor | float = 1.0
        if self.reads_sft:
            mean = torch.tensor([chosen_tokens_means[row] for row in batch.rows])
            mean = mean.to(batch.weights.device, non_blocking=True)
        return group_loss(
            self.loss,
            batch.token_counts,
            batch.weights,
            cu_rows=list(batch.cu_rows),
            labels=batch.labels,
            chosen_tokens_mean=mean,
        )

    def save(self, only_model: bool = False) -> Path:
        """Write checkpoint-STEP and return it; one with the model alone cannot be resumed from."""
        if only_model:
            return self._write_checkpoint(None)
        tensors = {
            "averages": self.averages.sums,
            "total_loss": self.total_loss,
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        tables = {"scores": self.scores, "eval_scores": self.eval_scores, "anchor": self.anchor}
        for name, table in tables.items():
            if table is not None and len(rows := table.rows()):
                tensors[f"{name}.rows"] = torch.from_numpy(rows)
                tensors[f"{name}.logp"] = torch.from_numpy(table.values[rows])
        facts = {
            "step": self.step,
            "updates": self.reference.updates,
            "window_scored": self.window_scored,
            "num_tokens": self.num_tokens,
            "config": self.config.as_dict(),
            "data": self.train_trees.fingerprint,
            "bf16": self.bf16,
            "best": self.best,
        }
        soft = self.reference.model
        state = checkpoint.RunState(
            facts,
            tensors,
            checkpoint.optimizer_tensors(self.optimizer),
            {} if soft is None else checkpoint.weights(soft),
        )
        return self._write_checkpoint(state)

    def _write_checkpoint(self, state: checkpoint.RunState | None) -> Path:
        return checkpoint.save_checkpoint(
            self.output_dir,
            self.step,
            self.policy,
            self.tokenizer,
            state,
            self.config.save_total_limit,
            self.best_checkpoint,
        )

    def restore(self, state: checkpoint.RunState) -> None:
        """Take up a saved state; the policy's weights have been read from the same folder."""
        facts, tensors = state.facts, state.tensors
        self.resumed = True
        self.step, self.reference.updates = facts["step"], facts["updates"]
        self.window_scored, self.num_tokens = facts["window_scored"], facts["num_tokens"]
        self.best = tuple(facts["best"]) if facts.get("best") else None
        self.averages.sums = tensors["averages"].to(self.device)
        self.total_loss = tensors["total_loss"].to(self.device)
        torch.set_rng_state(tensors["rng"])
        if self.device.type == "cuda" and "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.device)
        for name, table in {
            "scores": self.scores,
            "eval_scores": self.eval_scores,
            "anchor": self.anchor,
        }.items():
            if table is not None and f"{name}.rows" in tensors:
                table.values[tensors[f"{name}.rows"].numpy()] = tensors[f"{name}.logp"].numpy()
        if self.reference.model is not None:
            checkpoint.load_weights(self.reference.model, state.reference)
        checkpoint.load_optimizer(self.optimizer, state.optimizer)
        self.scheduler.last_epoch = self.step
        self.scheduler._last_lr = [
            base * factor(self.step)
            for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self.scheduler._last_lr, strict=True):
            group["lr"] = rate


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all parameters that is cheap for large models: names, shapes, sums and sums of
    magnitudes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        sums = (float(p.detach().double().sum()), float(p.detach().double().abs().sum()))
        digest.update(repr((name, tuple(p.shape), sums)).encode())
    return digest.hexdigest()
