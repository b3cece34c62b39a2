"""Packs to one optimizer step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import Loss
from fasttr.metrics.sums import as_metrics, by_name, means, pack_sums, zeros
from fasttr.metrics.throughput import Throughput
from fasttr.training.run import Run


class StepMetrics(NamedTuple):
    """What one optimizer step did; on the device until it is read."""

    step_means: Tensor  # in the order of fasttr.metrics.sums
    gradient_norm: Tensor  # () before clipping
    learning_rate: float  # that the step used
    is_broken: Tensor  # () fp32: 1 when loss or gradient were not finite and nothing was changed
    loss: Loss

    def read(self) -> dict[str, float]:
        """Under TRL's names; waits for the device."""
        return {
            **as_metrics(by_name(self.step_means), self.loss),
            "grad_norm": float(self.gradient_norm),
            "learning_rate": self.learning_rate,
        }


def train_step(run: Run, step: int, throughput: Throughput, moves: bool = False) -> StepMetrics:
    """Forward and backward over the packs of `step` (counted from 0), then one update.

    `moves`: the reference moves after this step; where it can it does so in the update's own sweep.
    """
    sums = _backward(run, step, throughput)
    learning_rate = run.scheduler.get_last_lr()[0]
    followers = run.reference.followers() if moves else None
    update = run.optimizer.update(sums[0], run.config.max_grad_norm, followers)
    run.scheduler.step()
    return StepMetrics(
        step_means=means(sums),
        gradient_norm=update.gradient_norm,
        learning_rate=learning_rate,
        is_broken=update.is_broken.to(torch.float32),
        loss=run.loss,
    )


def _backward(run: Run, step: int, throughput: Throughput) -> Tensor:
    """Gradients of all packs; returns the sums of their metrics."""
    packs = run.packs(step)
    run.optimizer.begin_step(len(packs))
    with run.policy.weights_still():
        return _sums_of(run, step, packs, throughput)


def _sums_of(run: Run, step: int, packs: list[PackedBatch], throughput: Throughput) -> Tensor:
    objective = run.objective.of_rows(run.trees, run.plan.rows(step))
    head = run.policy.head_weight().weight
    sums = zeros(run.device)
    for host_batch in packs:
        batch = host_batch.to(run.device)
        ref_logp = None
        if run.loss.needs_reference:
            ref_logp = run.window_logps.get(batch.rows).to(run.device, non_blocking=True)
        out = run.policy(
            batch,
            objective.loss_fn(batch),
            ref_logp,
            normalizer=objective.normalizer,
            stats=True,
            # What earlier packs began; fp32 compute keeps the order of sums of other trainers.
            head_grad=head.grad if run.policy.bf16 else None,
        )
        out.loss.backward()
        sums += pack_sums(out, ref_logp, batch, run.loss)
        throughput.add(host_batch, len(host_batch.rows))
        run.num_tokens += host_batch.num_tokens
    return sums
