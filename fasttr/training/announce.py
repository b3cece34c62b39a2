"""The lines that a person reads: what a run will do, and what it did."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from fasttr.batch import TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.console import counted, duration, say, shortened
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.losses import Loss
from fasttr.metrics.ties import without_ties
from fasttr.models.choice import Choice
from fasttr.models.lora import factor_names
from fasttr.models.packed import PackedModel
from fasttr.optim.matrices import size_of
from fasttr.optim.named import OPTIMIZERS
from fasttr.packing.plan import Plan, unshared_tokens
from fasttr.packing.shares import balance, lockstep_balance
from fasttr.packing.tiers import (
    SHARED,
    bins_of_groups,
    model_tokens,
    row_tokens,
    sequence_lengths,
    tree_sizes,
)
from fasttr.settings import settings_of
from fasttr.training.pace import Pace
from fasttr.training.run import Run

WIDTH = 80  # columns of a line
# Said before the first line that has the metric.
_HOW_TO_READ = {
    "rewards/accuracies": "acc and margin against the reference",
    "memory/peak_gib": "G: peak GiB",
}


class Part(NamedTuple):
    """A piece of a line; the highest `rank` is left out first where a line is too long."""

    text: str
    rank: int = 0


class _Shown(NamedTuple):
    key: str
    label: str
    format: str
    rank: int


_STEP_LINE = (
    _Shown("loss", "loss", ".4f", 0),
    _Shown("reward", "reward", "+.4f", 0),
    _Shown("rewards/margins", "margin", "+.3f", 1),
    _Shown("rewards/accuracies", "acc", ".3f", 1),
    _Shown("margin", "margin", "+.3f", 1),
    _Shown("accuracy", "acc", ".3f", 1),
    _Shown("kl", "kl", ".3f", 2),
    _Shown("completions/mean_length", "length", ".1f", 2),
    _Shown("perf/generation_share", "generating", ".0%", 3),
    _Shown("grad_norm", "grad", ".3g", 4),
)


def announce_plan(config: TrainConfig, loss: Loss, plan: Plan, ranks: Ranks = ALONE) -> None:
    """What a run will do, and a warning where it will not do what was asked."""
    steps, trees = plan.total_steps, plan.trees
    shared = plan.tokens(np.arange(len(trees)))
    unshared = unshared_tokens(trees, np.arange(len(trees)), trees.completion_lengths.shape[1])
    epochs = steps / plan.steps_per_epoch
    rows = min(config.train_batch_size, plan.rows_per_epoch)
    say(
        f"{counted(steps, 'step')} of {counted(rows, 'row')} ({epochs:.2f} epochs of "
        f"{counted(plan.steps_per_epoch, 'step')})"
    )
    repeated = f", {unshared / plan.steps_per_epoch:,.0f} with prompts repeated"
    say(
        f"tokens per step: {shared / plan.steps_per_epoch:,.0f} packed"
        f"{repeated if unshared > shared else ''}"
    )
    if plan.cuts:
        _announce_parts(loss, plan, ranks)
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


def _announce_parts(loss: Loss, plan: Plan, ranks: Ranks) -> None:
    """How much of the data is longer than a pack, which costs a forward pass more."""
    what, sizes = "row", row_tokens(plan.tier, plan.trees)
    if loss.coupled and ranks.world == 1:
        what, sizes = "group", _sizes_of_first_groups(plan, sizes)
    over = int((sizes > plan.max_tokens_per_batch).sum())
    if over:
        say(
            f"{over:,} of {counted(len(sizes), what)} are over max_tokens_per_batch "
            f"{plan.max_tokens_per_batch}: they go through the layers in parts, which costs one "
            f"forward pass more; the longest has {sizes.max():,} tokens"
        )


def _sizes_of_first_groups(plan: Plan, sizes: np.ndarray) -> np.ndarray:
    """Tokens of every group of the first steps, from those of rows."""
    found = []
    for step in range(min(plan.total_steps, 8)):
        of_step = sizes[plan.rows(step)]
        found.append(np.add.reduceat(of_step, np.arange(0, len(of_step), plan.group_rows)))
    return np.concatenate(found)


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
    budget = config.token_budget(torch.device("cpu"))  # chosen before, but on a CPU
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
    for name in ("eval_dataset_name", "test_split_size"):
        if getattr(config, name) is not None and not config.evaluates:
            say(f"WARNING: {name}: nothing is evaluated; write eval_strategy: steps (or epoch)")
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
    if schedule.every is None:
        first = config.ref_model_name_or_path or "the policy at its start"
        say(f"reference: fixed, {first}")
        return
    trails = ""
    if updates:
        trails = f"; trails the policy by {schedule.mean_age(steps):.1f} steps on average"
    say(f"reference: {config.ref_update}, {counted(updates, 'update')} planned{trails}")
    if updates == 0:
        say(
            "WARNING: the reference will never move: ref_update_every is "
            f"{schedule.every} and the run has {counted(steps, 'step')}; lower ref_update_every"
        )


def announce_adapter(policy: PackedModel) -> None:
    sizes = [(size_of(p), p.requires_grad) for p in policy.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    adapted = len(factor_names(policy))
    say(
        f"LoRA: {adapted} matrices are adapted, {trained:,} of "
        f"{sum(size for size, _ in sizes):,} weights are trained"
    )


def announce_step(run: Any, line: dict[str, Any], pace: Pace) -> None:
    """A line of metrics; before the first one, how it is read."""
    total = run.plan.total_steps
    if pace.is_first_line():
        words = [text for key, text in _HOW_TO_READ.items() if key in line]
        say("; ".join(["lines: elapsed<left", *words]))
    say(step_line(run.step, total, line, pace.elapsed, pace.left(run.step, total)))


def step_line(
    step: int, total_steps: int, line: dict[str, Any], elapsed: float, left: float
) -> str:
    """At most 80 columns; what does not fit stands in metrics.jsonl."""
    shown = without_ties(line)
    parts = [Part(f"step {step}/{total_steps}"), Part(f"{duration(elapsed)}<{duration(left)}")]
    parts += [
        Part(f"{one.label} {shown[one.key]:{one.format}}", one.rank)
        for one in _STEP_LINE
        if one.key in shown
    ]
    if "perf/tokens_per_second" in shown:
        parts.append(Part(f"{shortened(shown['perf/tokens_per_second'])} tok/s"))
    if "memory/peak_gib" in shown:
        parts.append(Part(f"{shown['memory/peak_gib']:.1f}G", 1))
    return _fitted(parts)


def _fitted(parts: list[Part]) -> str:
    """Parts in their order, closer together or without the least of them where they are long."""
    kept = list(parts)
    while True:
        texts = [part.text for part in kept]
        wide, narrow = "  ".join(texts), " ".join(texts)
        last = max(part.rank for part in kept)
        if len(wide) <= WIDTH:
            return wide
        if last <= 1 and len(narrow) <= WIDTH:
            return narrow
        if last == 0:
            return narrow
        dropped = max(range(len(kept)), key=lambda place: (kept[place].rank, place))
        del kept[dropped]


def announce_evaluation(run: Run, metrics: dict[str, float], name: str) -> None:
    for line in evaluation_lines(run.step, metrics, name):
        say(line)


def evaluation_lines(step: int, metrics: dict[str, float], name: str = "") -> list[str]:
    """First how far the policy has come from where it began, which compares over a run and between
    runs; then what restarts with the reference, where that is another number."""
    prefix = f"eval_{name}_" if name else "eval_"
    line = {metric.removeprefix(prefix): value for metric, value in metrics.items()}
    where = f" on {name}" if name else ""
    head = f"evaluation{where} at step {step}:"
    has_anchor = "anchor/logratios/chosen" in line
    shown = without_ties(line)
    loss = f"loss {line['loss']:.4f}"
    if not has_anchor:
        return [f"{head} {'  '.join([*_accuracy_and_margin(shown, ''), loss])}"]
    if line["anchor/logratios/chosen"] == line.get("anchor/logratios/rejected", 0) == 0:
        return [f"{head} the policy is the initial one  {loss}"]
    first, *further = _accuracy_and_margin(shown, "anchor/") or ["no pairs"]
    second = "  ".join([*further, loss])
    of_reference = _accuracy_and_margin({**shown, "rewards/accuracies_stderr": None}, "")
    is_another = not math.isclose(
        line.get("rewards/margins", 0), line.get("anchor/rewards/margins", 0), abs_tol=5e-4
    )
    if of_reference and is_another:
        second += f"; against the reference {' '.join(of_reference)}"
    return [f"{head} {first} against the initial policy", f"  {second}"]


def _accuracy_and_margin(line: dict[str, Any], prefix: str) -> list[str]:
    parts = []
    for share in ("rewards/accuracies", "accuracy"):
        if prefix + share in line:
            stderr = line[f"{prefix}{share}_stderr"]
            error = "" if stderr is None else f" +- {stderr:.3f}"
            parts.append(f"accuracy {line[prefix + share]:.3f}{error}")
    if f"{prefix}rewards/margins" in line:
        parts.append(f"margin {line[f'{prefix}rewards/margins']:+.3f}")
    return parts
