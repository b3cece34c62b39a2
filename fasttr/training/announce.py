"""The lines that a person reads: what a run will do, and what it did."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.losses import Loss
from fasttr.models.choice import Choice
from fasttr.models.lora import factor_names
from fasttr.models.packed import PackedModel
from fasttr.optim.named import OPTIMIZERS
from fasttr.packing.plan import Plan, unshared_tokens
from fasttr.packing.shares import balance, lockstep_balance
from fasttr.packing.tiers import (
    SHARED,
    bins_of_groups,
    model_tokens,
    sequence_lengths,
    tree_sizes,
)
from fasttr.settings import settings_of
from fasttr.training.run import Run


class _Shown(NamedTuple):
    key: str
    label: str
    format: str


_STEP_LINE = (
    _Shown("rewards/margins", "margin", "+.4f"),
    _Shown("rewards/accuracies", "accuracy", ".3f"),
    _Shown("margin", "margin", "+.4f"),
    _Shown("accuracy", "accuracy", ".3f"),
    _Shown("kl", "kl", ".3f"),
    _Shown("ref/updates", "updates", "d"),
    _Shown("grad_norm", "grad", ".3g"),
    _Shown("learning_rate", "lr", ".2e"),
)


def announce_plan(config: TrainConfig, loss: Loss, plan: Plan, ranks: Ranks = ALONE) -> None:
    """What a run will do, and a warning where it will not do what was asked."""
    steps, trees = plan.total_steps, plan.trees
    shared = plan.tokens(np.arange(len(trees)))
    unshared = unshared_tokens(trees, np.arange(len(trees)), trees.completion_lengths.shape[1])
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
        if ranks.is_sharded:
            found.append(lockstep_balance(costs, ranks.world, plan.max_tokens_per_batch))
        else:
            found.append(balance(costs, ranks.world))
    share = sum(found) / max(len(found), 1)
    advice = ""
    if share < 0.9:
        advice = f"; raise train_batch_size, {config.train_batch_size} rows cannot be dealt evenly"
    say(f"{ranks.world} processes, whose shares of a step are {share:.0%} of even{advice}")
    if ranks.is_sharded:
        copies = ranks.world // ranks.shard_size
        say(
            f"weights: divided among {ranks.shard_size} processes, {copies} "
            f"{'copy' if copies == 1 else 'copies'} in all"
        )


def announce_tier(choice: Choice, trees: TreeSource, config: TrainConfig) -> None:
    """How rows share a call of the model, why not in a cheaper way, and what that costs."""
    say(f"attention_tier: {choice.tier} ({choice.reason}){_cost(choice.tier, trees, config)}")


def _cost(tier: str, trees: TreeSource, config: TrainConfig) -> str:
    """Tokens of the model for the first steps' rows, against sharing their prompts."""
    if tier == SHARED:
        return ""
    rows = np.arange(min(len(trees), 8 * config.train_batch_size))
    budget = config.max_tokens_per_batch or 0
    lengths = sequence_lengths(trees, rows)
    bins = bins_of_groups(tier, trees, rows, np.arange(len(rows)), budget)
    given = sum(model_tokens(tier, lengths[members].ravel().tolist()) for members in bins)
    return f"; {given / int(tree_sizes(trees, rows).sum()):.2f} times the tokens of shared prompts"


def _held(config: TrainConfig) -> str:
    if config.dtype == "auto":
        return "the same as float32, whatever the folder holds"
    if not OPTIMIZERS[config.optim].is_adamw:
        return f"weights stay float32 with optim {config.optim}; computing is in bfloat16"
    return (
        "matrices are rounded stochastically after each step; with float32 no bit is lost, at 2 "
        "bytes a weight"
    )


def announce_settings(config: TrainConfig, loss: Loss, trees: TreeSource) -> None:
    """Settings that do nothing, or something else than they may be meant for."""
    if config.dtype != "float32":
        say(f"dtype: got {config.dtype}: {_held(config)}")
    if OPTIMIZERS[config.optim].notice:
        say(f"optim: got {config.optim}: {OPTIMIZERS[config.optim].notice}")
    if config.learning_rate == 0:
        say("WARNING: learning_rate is 0: nothing will be learned")
    for name in config.unread_loss_settings(loss):
        say(f"WARNING: {name}: ignored: {' + '.join(config.loss_names)} does not read it")
    for name in ("ref_update_alpha", "ref_update_every"):
        is_default = getattr(config, name) == settings_of(TrainConfig)[name].default
        if config.ref_update == "none" and not is_default:
            say(
                f"WARNING: {name}: ignored: the reference does not move; write ref_update: soft "
                "(or hard)"
            )
    if loss.unpaired:
        _announce_unpaired(config, loss, trees)


def _announce_unpaired(config: TrainConfig, loss: Loss, trees: TreeSource) -> None:
    if loss.completions > 1 and config.train_sampling_strategy == "random":
        say(
            "train_sampling_strategy: random: rows are shuffled, each with its mismatched "
            "completion; TRL's KTO takes them in their order: write sequential for that"
        )
    labels = getattr(trees, "labels", None)
    if labels is not None and (labels.all() or not labels.any()):
        verdict = "desirable (label true)" if labels.all() else "undesirable (label false)"
        say(
            f"WARNING: all {len(labels)} rows are {verdict}: without rows of the other class the "
            "loss only pushes one way"
        )


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


def announce_evaluation(run: Run, metrics: dict[str, float], name: str) -> None:
    prefix = f"eval_{name}_" if name else "eval_"
    line = {metric.removeprefix(prefix): value for metric, value in metrics.items()}
    where = f" on {name}" if name else ""
    parts = [f"evaluation{where} at step {run.step}: loss {line['loss']:.4f}"]
    for share in ("rewards/accuracies", "accuracy"):
        if share in line:
            parts.append(f"accuracy {line[share]:.3f} +- {line[f'{share}_stderr']:.3f}")
    if "rewards/margins" in line:
        parts.append(f"margin {line['rewards/margins']:+.4f}")
    if "anchor/rewards/margins" in line:
        parts.append(f"against the initial policy {line['anchor/rewards/margins']:+.4f}")
    say("  ".join(parts))
