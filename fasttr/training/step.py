"""Packs to one optimizer step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import StepObjective
from fasttr.metrics.ledger import Ledger
from fasttr.metrics.sums import MicroBatches, by_name, over_micro_batches
from fasttr.metrics.throughput import Throughput
from fasttr.models.passes import forward_and_backward
from fasttr.optim.adamw import after_step
from fasttr.optim.update import begin_step, update
from fasttr.packing.plan import unshared_tokens
from fasttr.training.coupled_step import coupled_step
from fasttr.training.run import Run


class StepMetrics(NamedTuple):
    """What one optimizer step did; on the device until it is read."""

    micro_means: Tensor  # (micro-batches of the step, values in the order of the ledger's names)
    gradient_norm: Tensor  # () before clipping
    learning_rate: float  # that the step used
    is_broken: Tensor  # () fp32: 1 when loss or gradient were not finite and nothing was changed
    ledger: Ledger

    def read(self) -> dict[str, float]:
        """Under TRL's names; waits for the device."""
        means = by_name(over_micro_batches(self.micro_means), self.ledger.names)
        return {
            **self.ledger.metrics(means),
            "grad_norm": float(self.gradient_norm),
            "learning_rate": self.learning_rate,
        }


def train_step(run: Run, step: int, throughput: Throughput, moves: bool = False) -> StepMetrics:
    """Forward and backward over the packs of `step` (counted from 0), then one update.

    Every rank adds up the gradients of its own packs; their sum over all ranks is the step's, so
    that a step does not depend on how many there are. The decisions below are the same on each.

    `moves`: the reference moves after this step; where it can it does so in the update's own sweep.
    """
    sums = _backward(run, step, throughput)
    _sum_over_ranks(run, sums)
    return finish_step(run, run.ledger.means(sums), moves)


def finish_step(run: Run, micro_means: Tensor, moves: bool = False) -> StepMetrics:
    """The update on the gradients that are there; `micro_means` begin with the step's loss."""
    learning_rate = run.scheduler.get_last_lr()[0]
    shards = run.policy.shards
    done = update(
        run.optimizer,
        run.policy,
        loss=micro_means[0, 0],
        max_grad_norm=run.config.max_grad_norm,
        followers=run.reference.followers() if moves else None,
        squares=None if shards is None else shards.gradient_squares(),
    )
    after_step(run.scheduler)
    return StepMetrics(
        micro_means=micro_means,
        gradient_norm=done.gradient_norm,
        learning_rate=learning_rate,
        is_broken=done.is_broken.to(torch.float32),
        ledger=run.ledger,
    )


def _backward(run: Run, step: int, throughput: Throughput) -> Tensor:
    """Gradients of all packs; returns the sums of their metrics, by micro-batch."""
    packs = run.packs(step)
    passes = sum(max(len(batch.parts), 1) for batch in packs)
    # Among several ranks what is added up has one dtype, however many packs each has.
    begin_step(run.optimizer, passes if run.ranks.world == 1 else max(passes, 2))
    with run.policy.weights_still():
        return _sums_of(run, step, packs, throughput)


def _sums_of(run: Run, step: int, packs: list[PackedBatch], throughput: Throughput) -> Tensor:
    rows = run.plan.rows(step)
    objective = run.objective.of_rows(run.trees, rows)
    micro_batches = run.plan.micro_batches(rows)
    micro_batch_of = dict(zip(rows.tolist(), micro_batches.tolist(), strict=True))
    number = int(micro_batches[-1]) + 1
    coupled = None
    if run.loss.coupled and run.ranks.world > 1:
        assert isinstance(objective, StepObjective)  # of log-probs: see fasttr.training.loop
        of_step = MicroBatches(torch.from_numpy(micro_batches), number)
        coupled = coupled_step(run, step, packs, objective, of_step)
    sums = run.ledger.zeros(run.device, number)
    head = run.policy.head_weight().weight
    for host_batch in packs:
        batch = host_batch.to(run.device)
        if not batch.rows:
            forward_and_backward(run.policy, batch, _nothing)
            continue
        ref_logp = None
        if run.loss.needs_reference:
            ref_logp = run.window_logps.get(batch.rows).to(run.device, non_blocking=True)
        loss_fn = objective.loss_fn(batch)
        normalizer = float(objective.normalizer)
        if coupled is not None:
            loss_fn = coupled.loss_fn(batch)
            normalizer = 1.0
        out = forward_and_backward(
            run.policy,
            batch,
            loss_fn,
            ref_logp,
            normalizer=normalizer,
            stats=True,
            router_share=len(batch.rows) / len(rows),
            # What earlier packs began; fp32 compute keeps the order of sums of other trainers.
            head_grad=head.grad if run.policy.bf16 and run.policy.shards is None else None,
            head_means=objective.head_means,
        )
        places = torch.tensor([micro_batch_of[row] for row in batch.rows])
        of_pack = MicroBatches(places.to(run.device, non_blocking=True), number)
        found = run.ledger.of_pack(out, ref_logp, batch, of_pack, run.policy.router_loss)
        sums = run.ledger.merged(sums, found)
        throughput.add(host_batch, len(host_batch.rows))
    # A mismatched completion of KTO is of another row and is not counted twice.
    completions = 1 if run.loss.unpaired else run.loss.completions
    run.num_tokens += unshared_tokens(run.trees, rows, completions)
    return sums if coupled is None else coupled.corrected(sums, run.ranks.is_first)


def _nothing(logp: Tensor, *_: Any, **__: Any) -> Tensor:
    """The loss of an idle pack. A constant would have no backward, and ranks meet in it too."""
    return 0.0 * logp.sum()


def _sum_over_ranks(run: Run, sums: Tensor) -> None:
    if run.ranks.world == 1:
        return
    run.ranks.sum_([sums])
    if run.policy.shards is not None:
        run.policy.shards.sum_gradients()
        return
    gradients = []
    for parameter in run.policy.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # no pack of this step was this rank's
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    run.ranks.sum_(gradients)
