"""Packs to one optimizer step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttr.metrics.ledger import Ledger
from fasttr.metrics.sums import by_name
from fasttr.metrics.throughput import Throughput
from fasttr.training.run import Run


class StepMetrics(NamedTuple):
    """What one optimizer step did; on the device until it is read."""

    step_means: Tensor  # in the order of the ledger's names
    gradient_norm: Tensor  # () before clipping
    learning_rate: float  # that the step used
    is_broken: Tensor  # () fp32: 1 when loss or gradient were not finite and nothing was changed
    ledger: Ledger

    def read(self) -> dict[str, float]:
        """Under TRL's names; waits for the device."""
        return {
            **self.ledger.metrics(by_name(self.step_means, self.ledger.names)),
            "grad_norm": float(self.gradient_norm),
            "learning_rate": self.learning_rate,
        }


def train_step(run: Run, step: int, throughput: Throughput) -> StepMetrics:
    """Forward and backward over the packs of `step` (counted from 0), then one update."""
    return update(run, _backward(run, step, throughput))


def update(run: Run, sums: Tensor) -> StepMetrics:
    """One step of the optimizer on the gradients that are there; nothing changes where they, or the
    loss that `sums` begins with, are not finite."""
    gradient_norm = _clip(run.policy, run.config.max_grad_norm)
    is_broken = ~torch.isfinite(gradient_norm) | ~torch.isfinite(sums[0])
    learning_rate = run.scheduler.get_last_lr()[0]
    # With this flag up the fused kernel changes nothing: no weight, no moment.
    run.optimizer.found_inf = is_broken.to(torch.float32)  # type: ignore[attr-defined]
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad(set_to_none=True)
    return StepMetrics(
        run.ledger.means(sums),
        gradient_norm,
        learning_rate,
        is_broken.to(torch.float32),
        run.ledger,
    )


def _backward(run: Run, step: int, throughput: Throughput) -> Tensor:
    """Gradients of all packs; returns the sums of their metrics."""
    objective = run.objective.of_rows(run.trees, run.plan.rows(step))
    sums = run.ledger.zeros(run.device)
    for host_batch in run.plan.packs(step):
        batch = host_batch.to(run.device)
        ref_logp = None
        if run.loss.needs_reference:
            ref_logp = run.window_logps.get(batch.rows).to(run.device, non_blocking=True)
        out = run.policy(
            batch, objective.loss_fn(batch), ref_logp, normalizer=objective.normalizer, stats=True
        )
        out.loss.backward()
        sums = run.ledger.merged(sums, run.ledger.of_pack(out, ref_logp, batch))
        throughput.add(host_batch, len(host_batch.rows))
        run.num_tokens += host_batch.num_tokens
    return sums


def _clip(policy: nn.Module, max_grad_norm: float) -> Tensor:
    """Clip the gradient's norm and return what it was; 0 clips nothing."""
    trained = [p for p in policy.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    return norm
