"""Settings that contradict each other, or what a run cannot be made of. Ranges are in the settings.

The functions read a `TrainConfig`; it is not imported, since it calls them.
"""

from __future__ import annotations

import os
import re
from typing import Any

from fasttr.data.mixture import parse_handbook, parse_parts
from fasttr.errors import FasttrError, all_of, one_line
from fasttr.losses import Loss
from fasttr.metrics.trackers import tracker_names
from fasttr.models.lora import is_adapter
from fasttr.models.quantised import check_installed
from fasttr.optim.adamw import PLATEAU
from fasttr.optim.named import OPTIMIZERS, check_optimizer

PATHS = (
    "output_dir",
    "resume_from_checkpoint",
    "model_name_or_path",
    "ref_model_name_or_path",
    "dataset_name",
    "eval_dataset_name",
)
# Of an evaluation, or of one of several sets by its name.
BEST_METRICS = re.compile(r"eval_(.+_)?(loss$|rewards/|anchor/)")


def check(config: Any) -> None:
    """Raise FasttrError (got, wanted, remedy) for the contradictions of a configuration."""
    reasons = []
    for one in (
        _check_paths,
        _check_mixture,
        _check_cuts,
        _check_trackers,
        _check_optimizer,
        _check_best,
        _check_stopping,
        _check_adapter,
        _check_named_loss,
        _check_groups,
    ):
        try:
            one(config)
        except FasttrError as error:
            reasons.append(str(error))
    if reasons:
        raise all_of(reasons)


def _check_optimizer(config: Any) -> None:
    check_optimizer(config.optim, config.optim_args)
    if config.adam_moments not in (None, "fp32") and not OPTIMIZERS[config.optim].is_adamw:
        raise FasttrError(
            f"adam_moments: got {config.adam_moments} with optim {config.optim}, which has its "
            "own; leave it out, or take adamw_torch"
        )
    if config.ref_on_host and (config.ref_update != "soft" or config.ref_update_every == 1):
        raise FasttrError(
            f"ref_on_host: got true with ref_update {config.ref_update} every "
            f"{config.ref_update_every}; wanted a soft reference that rests for more than a step"
        )
    if config.activation_memory_budget is not None and config.gradient_checkpointing:
        raise FasttrError(
            f"activation_memory_budget: got {config.activation_memory_budget:g} with "
            "gradient_checkpointing true, which keeps nothing of a layer; leave one of them out"
        )
    if config.activation_offloading and (
        config.gradient_checkpointing is False or config.activation_memory_budget is not None
    ):
        raise FasttrError(
            "activation_offloading: got true with gradient_checkpointing false or an "
            "activation_memory_budget; wanted gradient_checkpointing, which leaves little "
            "enough to move: leave them out"
        )
    if config.dtype == "bfloat16" and config.bf16 is False:
        raise FasttrError(
            "dtype: got bfloat16 with bf16 false; bfloat16 weights compute in bfloat16: leave bf16 "
            "out, or take dtype float32"
        )
    if config.lr_scheduler_type != PLATEAU:
        return
    asks = f"lr_scheduler_type: got {PLATEAU}"
    if config.eval_strategy == "no":
        raise FasttrError(f"{asks} with eval_strategy no; wanted steps or epoch")
    _check_comparable(config, asks)


def _check_trackers(config: Any) -> None:
    tracker_names(config.report_to)


def _check_named_loss(config: Any) -> None:
    check_loss(config, config.loss, " + ".join(config.loss_names))


def _check_groups(config: Any) -> None:
    if config.group_size is not None and config.train_batch_size % config.group_size:
        raise FasttrError(
            f"group_size: got {config.group_size}; wanted a divisor of train_batch_size "
            f"{config.train_batch_size}"
        )
    if config.micro_batch_size is not None and config.train_batch_size % config.micro_batch_size:
        raise FasttrError(
            f"micro_batch_size: got {config.micro_batch_size}; wanted a divisor of "
            f"train_batch_size {config.train_batch_size}"
        )
    group = config.group_size or config.train_batch_size
    if config.mismatch_size is not None and group % config.mismatch_size:
        raise FasttrError(
            f"mismatch_size: got {config.mismatch_size}; wanted a divisor of the group of {group}"
        )


def check_loss(config: Any, loss: Loss, name: str) -> None:
    """What the rest of the configuration asks of the loss."""
    if config.ref_update != "none" and not loss.needs_reference:
        raise FasttrError(
            f"ref_update: got {config.ref_update}, but loss_type {name} has no reference; wanted "
            "ref_update none"
        )
    if config.ref_model_name_or_path is not None and not loss.needs_reference:
        raise FasttrError(
            f"ref_model_name_or_path: loss_type {name} has no reference; leave it out"
        )
    estimates_kl = loss.unpaired and loss.completions > 1
    if estimates_kl and config.group_rows(loss) == 1:
        raise FasttrError(
            f"train_batch_size: got a group of 1 row with {name}, whose KL term would be the row's "
            "own reward; wanted 2"
        )
    if config.truncation_mode == "keep_end" and loss.unpaired:
        raise FasttrError(
            f"truncation_mode: got keep_end with loss_type {name}; a mismatched completion is cut "
            "at its end, as in TRL: wanted keep_start"
        )
    if config.ld_alpha is not None and (loss.unpaired or loss.completions == 1):
        raise FasttrError(
            f"ld_alpha: got {config.ld_alpha} with loss_type {name}; it compares the lengths of a "
            "pair"
        )


def check_sources(config: Any, *, has_model: bool, has_data: bool, has_eval_data: bool) -> None:
    """That there is a model, and rows to train and to evaluate on; all that is missing at once."""
    missing = []
    if config.model_name_or_path is None and not has_model:
        missing.append("model_name_or_path (a folder or a hub id)")
    named = config.dataset_name is not None or config.datasets or config.dataset_mixture
    if not named and not has_data:
        missing.append("dataset_name (a file, a folder or a hub id), or a list under datasets")
    if missing:
        raise FasttrError(f"missing: {'; '.join(missing)}; --help lists all settings")
    lacks_eval_data = not named and config.eval_dataset_name is None and not has_eval_data
    if config.evaluates and lacks_eval_data:
        raise FasttrError(
            "eval_strategy: there are no rows to evaluate on; give eval_dataset or "
            "eval_dataset_name"
        )


def _check_paths(config: Any) -> None:
    """Every name that may be a path is one that the system can look up, there or not."""
    for key in PATHS:
        value = getattr(config, key)
        if not isinstance(value, str):
            continue
        try:
            os.stat(value)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            shown = value if len(value) < 60 else value[:60] + "..."
            raise FasttrError(
                f"{key}: got {shown!r}, which cannot be a path here: {reason}"
            ) from error


def _check_mixture(config: Any) -> None:
    if config.dataset_mixture:
        mixture = parse_handbook(config.dataset_mixture)
        has_test = mixture.test_split_size is not None or bool(mixture.test_datasets)
    elif config.datasets:
        parse_parts(config.datasets)
        has_test = config.test_split_size is not None
    else:
        return
    splits = {"train", "test"} if has_test else {"train"}
    if config.dataset_train_split not in splits:
        raise FasttrError(
            f"dataset_train_split: got {config.dataset_train_split!r}; a mixture's rows are split "
            "'train'"
        )
    if config.evaluates and config.eval_dataset_name is None and not has_test:
        raise FasttrError(
            "eval_strategy: a mixture has no test split of its own; give test_split_size or "
            "eval_dataset_name"
        )


def _check_quantised(config: Any) -> None:
    """What weights in 4 bits cannot be combined with."""
    for name in ("merge_adapter", "use_dora", "lora_target_parameters"):
        if getattr(config, name):
            raise FasttrError(
                f"{name}: got {getattr(config, name)} with load_in_4bit; it needs the weights "
                "themselves: leave one of them out"
            )


def _check_adapter(config: Any) -> None:
    """What a low-rank adapter cannot be combined with."""
    if not config.use_peft:
        for name in ("merge_adapter", "load_in_4bit"):
            if getattr(config, name):
                raise FasttrError(
                    f"{name}: got true without an adapter; wanted use_peft true, or leave it out"
                )
        return
    if config.load_in_4bit:
        check_installed()
        _check_quantised(config)
    if config.resize_embeddings:
        raise FasttrError(
            "resize_embeddings: got true with use_peft, whose folder would not hold the new rows; "
            "wanted a model that is resized and saved before"
        )
    if config.model_name_or_path is not None and is_adapter(config.model_name_or_path):
        raise FasttrError(
            f"model_name_or_path: {config.model_name_or_path} is an adapter itself, and an adapter "
            "on it would not say what it is for; train that one with merge_adapter true first"
        )
    if config.ref_update != "soft":
        return
    why = "the reference becomes an average of low-rank updates of one base"
    if config.use_dora:
        raise FasttrError(
            f"use_dora: got true with ref_update soft; {why}, and DoRA's weight is none: wanted "
            "ref_update none or hard"
        )
    if config.lora_target_parameters:
        raise FasttrError(
            f"lora_target_parameters: got {config.lora_target_parameters} with ref_update soft; "
            f"{why} in modules: wanted lora_target_modules, or ref_update none or hard"
        )
    if config.ref_model_name_or_path is not None:
        raise FasttrError(
            f"ref_model_name_or_path: got {config.ref_model_name_or_path} with use_peft and "
            f"ref_update soft; {why}: leave it out"
        )
    if config.ref_lora_rank is not None and config.ref_lora_rank < config.lora_r:
        raise FasttrError(
            f"ref_lora_rank: got {config.ref_lora_rank}; wanted lora_r {config.lora_r} or more"
        )


def _check_cuts(config: Any) -> None:
    """Which rows are drawn for a test, and how rows are cut."""
    drawn = config.test_split_size is not None and not config.datasets
    if drawn and config.dataset_train_split == config.dataset_test_split:
        raise FasttrError(
            f"dataset_test_split: got {config.dataset_test_split!r} for the rows that "
            "test_split_size draws, which is dataset_train_split too; wanted another name"
        )
    shortest = config.max_prompt_length
    if shortest is not None and config.max_length is not None and shortest >= config.max_length:
        raise FasttrError(
            f"max_prompt_length: got {shortest}, which leaves no room in max_length "
            f"{config.max_length}; wanted less"
        )


def _check_best(config: Any) -> None:
    """Settings of the best checkpoint."""
    if config.load_best_model_at_end:
        asks = "load_best_model_at_end: got true"
    elif config.save_strategy == "best":
        asks = "save_strategy: got best"
    else:
        return
    if config.eval_strategy == "no":
        raise FasttrError(f"{asks} with eval_strategy no; wanted steps or epoch")
    metric = config.best_metric
    if not BEST_METRICS.match(metric):
        raise FasttrError(
            f"metric_for_best_model: got {config.metric_for_best_model!r}; wanted loss, "
            "rewards/margins, rewards/accuracies or another of eval_rewards/ and eval_anchor/"
        )
    _check_comparable(config, asks)
    if config.save_strategy != "best":
        _check_saved_where_evaluated(config, asks)


def _check_stopping(config: Any) -> None:
    """Early stopping follows one metric of the evaluations."""
    if config.early_stopping_patience is None:
        return
    asks = f"early_stopping_patience: got {config.early_stopping_patience}"
    if config.eval_strategy == "no":
        raise FasttrError(f"{asks} with eval_strategy no; wanted steps or epoch")
    if config.metric_for_best_model is None:
        wanted = "loss, rewards/accuracies"
        if config.ref_update != "none":
            wanted = "eval_anchor/rewards/accuracies"
        raise FasttrError(f"{asks} without metric_for_best_model; wanted one, such as {wanted}")
    _check_comparable(config, asks)


def _check_comparable(config: Any, asks: str) -> None:
    """Evaluations that are compared are of one reference."""
    if config.ref_update != "none" and "anchor/" not in config.best_metric:
        raise FasttrError(
            f"{asks} with ref_update {config.ref_update} and metric {config.best_metric}: values "
            "against different references do not compare; wanted metric_for_best_model "
            "eval_anchor/rewards/accuracies, against the initial policy"
        )


def _check_saved_where_evaluated(config: Any, asks: str) -> None:
    if config.eval_strategy != config.save_strategy:
        raise FasttrError(
            f"{asks} with save_strategy {config.save_strategy}; wanted that of eval_strategy, or "
            "best"
        )
    if config.save_strategy != "steps":
        return
    is_share = (config.eval_every < 1, config.save_steps < 1)
    ratio = config.save_steps / config.eval_every
    if is_share[0] != is_share[1] or abs(ratio - round(ratio)) > 1e-9:
        raise FasttrError(
            f"save_steps: got {config.save_steps:g} with {asks}; wanted a multiple of "
            f"{config.eval_every:g}"
        )
