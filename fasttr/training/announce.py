"""The lines that a person reads: what a run will do, and what it did."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.distributed.ranks import Ranks
from fasttr.losses import Loss
from fasttr.models.lora import factor_names
from fasttr.models.packed import PackedModel
from fasttr.packing.plan import Plan, tree_sizes
from fasttr.packing.shares import balance
from fasttr.training.run import Run


class _Shown(NamedTuple):
    key: str
    label: str
    format: str


_STEP_LINE = (
    _Shown("rewards/margins", "margin", "+.4f"),
    _Shown("rewards/accuracies", "accuracy", ".3f"),
    _Shown("kl", "kl", ".3f"),
    _Shown("ref/updates", "updates", "d"),
    _Shown("grad_norm", "grad", ".3g"),
    _Shown("learning_rate", "lr", ".2e"),
)


def announce_plan(config: TrainConfig, loss: Loss, plan: Plan, ranks: Ranks) -> None:
    """What a run will do, and a warning where it will not do what was asked."""
    steps, trees = plan.total_steps, plan.trees
    shared = plan.tokens(np.arange(len(trees)))
    extra_prompts = trees.completion_lengths.shape[1] - 1
    unshared = shared + extra_prompts * int(trees.prompt_lengths.sum(dtype=np.int64))
    epochs = steps / plan.steps_per_epoch
    say(
        f"{steps} steps of {config.train_batch_size} rows ({epochs:.2f} epochs of "
        f"{plan.steps_per_epoch} steps)"
    )
    say(
        f"tokens per step: {shared / plan.steps_per_epoch:,.0f} packed, "
        f"{unshared / plan.steps_per_epoch:,.0f} with prompts repeated"
    )
    if ranks.world > 1:
        _announce_ranks(config, plan, ranks)
    if loss.needs_reference:
        _announce_reference(config, steps)
    else:
        say(f"reference: none, {' + '.join(config.loss_names)} has no use for one")
    if config.warmup_steps >= 1 and steps <= config.warmup_steps:
        say(
            f"WARNING: warmup_steps {config.warmup_steps:g} covers all {steps} steps: the full "
            "rate is never reached"
        )


def _announce_ranks(config: TrainConfig, plan: Plan, ranks: Ranks) -> None:
    """How evenly the first steps lie on the ranks: too few rows a step cannot be dealt evenly."""
    found = []
    for step in range(min(plan.total_steps, 8)):
        costs = tree_sizes(plan.trees, plan.rows(step)).tolist()
        found.append(balance(costs, ranks.world))
    share = sum(found) / max(len(found), 1)
    advice = ""
    if share < 0.9:
        advice = f"; raise train_batch_size, {config.train_batch_size} rows cannot be dealt evenly"
    say(f"{ranks.world} processes, whose shares of a step are {share:.0%} of even{advice}")


def _announce_reference(config: TrainConfig, steps: int) -> None:
    schedule = config.schedule
    updates = schedule.updates(steps)
    say(
        f"reference: {config.ref_update}, {updates} updates planned, mean age "
        f"{schedule.mean_age(steps):.1f} steps"
    )
    if schedule.every is not None and updates == 0:
        say(
            "WARNING: the reference will never move: ref_update_every is "
            f"{schedule.every} and the run has {steps} steps; lower ref_update_every"
        )


def announce_adapter(policy: PackedModel) -> None:
    sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    adapted = len(factor_names(policy))
    say(
        f"LoRA: {adapted} matrices are adapted, {trained:,} of "
        f"{sum(size for size, _ in sizes):,} weights are trained"
    )


def announce_step(run: Run, line: dict[str, Any]) -> None:
    parts = [f"step {run.step}/{run.plan.total_steps}", f"loss {line['loss']:.4f}"]
    for key, label, form in _STEP_LINE:
        if key in line:
            parts.append(f"{label} {line[key]:{form}}")
    parts.append(f"{line['perf/pairs_per_second']:.1f} rows/s")
    say("  ".join(parts))


def announce_evaluation(run: Run, line: dict[str, Any]) -> None:
    parts = [f"evaluation at step {run.step}: loss {line['eval_loss']:.4f}"]
    accuracy = line.get("eval_rewards/accuracies")
    if accuracy is not None:
        error = line["eval_rewards/accuracies_stderr"]
        parts.append(f"accuracy {accuracy:.3f} +- {error:.3f}")
    if "eval_rewards/margins" in line:
        parts.append(f"margin {line['eval_rewards/margins']:+.4f}")
    if "eval_anchor/rewards/margins" in line:
        parts.append(f"against the initial policy {line['eval_anchor/rewards/margins']:+.4f}")
    say("  ".join(parts))
