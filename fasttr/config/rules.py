"""Every value of a configuration in its range, and no setting that contradicts another."""

from __future__ import annotations

import math
import os
from typing import Any

from fasttr.data.mixture import check_test_split_size, parse_parts
from fasttr.errors import FasttrError
from fasttr.metrics.trackers import tracker_names
from fasttr.optim.adamw import NO_SCHEDULE

_INTERVAL = "a whole number from 1, or a share of all steps above 0 and below 1"


PATHS = (
    "output_dir",
    "resume_from_checkpoint",
    "model_name_or_path",
    "ref_model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
)


def _check_paths(c: Any) -> None:
    """Every name that may be a path is one that the system can look up, whether it is there or
    not."""
    for key in PATHS:
        value = getattr(c, key)
        if not isinstance(value, str):
            continue
        try:
            os.stat(value)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            shown = value if len(value) < 60 else value[:60] + "..."
            raise FasttrError(
                f"{key}: got {shown!r}, which cannot be a path here: {reason}"
            ) from error


def _interval(value: float) -> bool:
    return 0 < value < 1 or (value >= 1 and float(value).is_integer())


def check(c: Any) -> None:
    """Every value in its range, and no setting that contradicts another."""
    _check_paths(c)
    _check_data(c)
    tracker_names(c.report_to)
    ranges: list[tuple[str, bool, str]] = [
        ("beta", c.beta > 0 and math.isfinite(c.beta), "a number above 0"),
        ("ld_alpha", c.ld_alpha is None or 0 <= c.ld_alpha <= 1, "a number from 0 to 1"),
        ("discopop_tau", c.discopop_tau > 0, "a number above 0"),
        ("desirable_weight", c.desirable_weight >= 0, "a number from 0"),
        ("undesirable_weight", c.undesirable_weight >= 0, "a number from 0"),
        ("group_size", c.group_size is None or c.group_size >= 1, "a whole number from 1"),
        ("ref_update_alpha", 0 <= c.ref_update_alpha <= 1, "a number from 0 to 1"),
        ("ref_update_every", c.ref_update_every >= 1, "a whole number from 1"),
        ("train_batch_size", c.train_batch_size >= 1, "a whole number from 1"),
        (
            "max_tokens_per_batch",
            (c.max_tokens_per_batch or 1) >= 1 and c.max_tokens_per_batch != 0,
            "a number from 1",
        ),
        (
            "max_length",
            c.max_length is None or 1 < c.max_length < 2**31,
            "a whole number from 2, or none",
        ),
        (
            "learning_rate",
            c.learning_rate >= 0 and math.isfinite(c.learning_rate),
            "a number from 0",
        ),
        ("warmup_steps", c.warmup_steps >= 0, "a number from 0"),
        ("weight_decay", c.weight_decay >= 0, "a number from 0"),
        ("adam_beta1", 0 <= c.adam_beta1 < 1, "a number from 0 to below 1"),
        ("adam_beta2", 0 <= c.adam_beta2 < 1, "a number from 0 to below 1"),
        ("adam_epsilon", c.adam_epsilon > 0, "a number above 0"),
        (
            "max_steps",
            c.max_steps == -1 or c.max_steps >= 1,
            "a whole number from 1, or -1 for num_train_epochs",
        ),
        (
            "num_train_epochs",
            c.num_train_epochs > 0 and math.isfinite(c.num_train_epochs),
            "a number above 0",
        ),
        ("max_grad_norm", c.max_grad_norm >= 0, "a number from 0 (0 clips nothing)"),
        (
            "dataset_num_proc",
            c.dataset_num_proc is None or c.dataset_num_proc >= 1,
            "a whole number from 1, or none",
        ),
        ("logging_steps", _interval(c.logging_steps), _INTERVAL),
        ("eval_steps", c.eval_steps is None or _interval(c.eval_steps), _INTERVAL + ", or none"),
        ("save_steps", _interval(c.save_steps), _INTERVAL),
        ("eval_delay", c.eval_delay >= 0, "a number from 0"),
        (
            "save_total_limit",
            c.save_total_limit is None or c.save_total_limit >= 1,
            "a whole number from 1",
        ),
        ("max_dropped_fraction", 0 <= c.max_dropped_fraction <= 1, "a number from 0 to 1"),
        (
            "lr_scheduler_type",
            c.lr_scheduler_type not in NO_SCHEDULE,
            "a schedule that is known before training",
        ),
        (
            "dtype",
            c.dtype == "float32",
            "float32: weights and optimizer stay in it, bf16: true computes in bfloat16",
        ),
        ("seed", 0 <= c.seed < 2**32, "a whole number from 0 to below 2^32"),
        (
            "data_seed",
            c.data_seed is None or 0 <= c.data_seed < 2**32,
            "a whole number from 0 to below 2^32",
        ),
    ]
    numbers = {key: value for key, value in c.as_dict().items() if isinstance(value, float)}
    ranges += [(key, math.isfinite(value), "a finite number") for key, value in numbers.items()]
    for key, good, wanted in ranges:
        if not good:
            raise FasttrError(f"{key}: got {getattr(c, key)!r}; wanted {wanted}")
    _check_best(c)
    loss = c.loss
    if c.ref_update != "none" and not loss.needs_reference:
        raise FasttrError(
            f"ref_update: got {c.ref_update}, but loss_type {c.loss_name} has no reference; wanted "
            "ref_update none"
        )
    if c.ref_model_name_or_path is not None and not loss.needs_reference:
        raise FasttrError(
            f"ref_model_name_or_path: loss_type {c.loss_name} has no reference; leave it out"
        )
    if c.loss_type == "kto" and c.group_rows == 1:
        raise FasttrError(
            "train_batch_size: got a group of 1 row with kto, whose KL term would be the row's own "
            "reward; wanted 2"
        )
    if c.ld_alpha is not None and (loss.unpaired or loss.completions == 1):
        raise FasttrError(
            f"ld_alpha: got {c.ld_alpha} with loss_type {c.loss_name}; it compares the lengths of "
            "a pair"
        )
    if c.group_size is not None and c.train_batch_size % c.group_size:
        raise FasttrError(
            f"group_size: got {c.group_size}; wanted a divisor of train_batch_size "
            f"{c.train_batch_size}"
        )


def _check_data(c: Any) -> None:
    check_test_split_size(c.test_split_size)
    evaluates = c.eval_strategy != "no" or c.eval_on_start
    if c.datasets:
        parse_parts(c.datasets)
        if c.dataset_train_split != "train" and not (
            c.dataset_train_split == "test" and c.test_split_size
        ):
            raise FasttrError(
                f"dataset_train_split: got {c.dataset_train_split!r}; a mixture's rows are split "
                "'train'"
            )
        if evaluates and c.eval_dataset_name is None and not c.test_split_size:
            raise FasttrError(
                "eval_strategy: a mixture has no test split of its own; give test_split_size or "
                "eval_dataset_name"
            )
        return
    if c.dataset_name is None:
        raise FasttrError(
            "dataset_name: missing; give a file, a folder or a hub id, or a list under datasets"
        )
    if c.test_split_size is not None:
        raise FasttrError(
            "test_split_size: it splits a mixture and would be ignored with dataset_name; write "
            "the data set as "
            "datasets: [{path: ...}], or leave it out"
        )


def _check_best(c: Any) -> None:
    """Settings of the best checkpoint."""
    if not c.load_best_model_at_end and c.save_strategy != "best":
        return
    asks = (
        "load_best_model_at_end: got true"
        if c.load_best_model_at_end
        else "save_strategy: got best"
    )
    if c.eval_strategy == "no":
        raise FasttrError(f"{asks} with eval_strategy no; wanted steps or epoch")
    metric = c.best_metric
    if not metric.startswith(("eval_loss", "eval_rewards/", "eval_anchor/")):
        raise FasttrError(
            f"metric_for_best_model: got {c.metric_for_best_model!r}; wanted loss, "
            "rewards/margins, rewards/accuracies "
            "or another of eval_rewards/ and eval_anchor/"
        )
    if c.ref_update != "none" and not metric.startswith("eval_anchor/"):
        raise FasttrError(
            f"{asks} with ref_update {c.ref_update} and metric {metric}: values against different "
            "references do not "
            "compare; wanted metric_for_best_model eval_anchor/rewards/accuracies, against the "
            "initial policy"
        )
    if c.save_strategy == "best":
        return
    if c.eval_strategy != c.save_strategy:
        raise FasttrError(
            f"{asks} with save_strategy {c.save_strategy}; wanted that of eval_strategy, or best"
        )
    every = c.eval_steps or c.logging_steps
    ratio = c.save_steps / every
    if c.save_strategy == "steps" and (
        (every < 1) != (c.save_steps < 1) or abs(ratio - round(ratio)) > 1e-9
    ):
        raise FasttrError(
            f"save_steps: got {c.save_steps:g} with {asks}; wanted a multiple of {every:g}"
        )
