"""From a configuration to a run that is ready: data and models read and announced, a checkpoint
taken up."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttr.batch import TreeSource
from fasttr.checkpoint import folder as checkpoint
from fasttr.config.train_config import TrainConfig
from fasttr.data.load import DataConfig, TreeSet, encode_rows, load_trees
from fasttr.data.mixture import parse_parts, read_mixture
from fasttr.data.unpaired import Unpaired
from fasttr.errors import FasttrError
from fasttr.metrics.sums import Averages
from fasttr.metrics.trackers import require_trackers
from fasttr.models.load import (
    dropout_rates,
    liger_is_usable,
    load_config,
    load_model,
    load_tokenizer,
)
from fasttr.optim.adamw import adamw, schedule
from fasttr.packing.plan import Plan
from fasttr.reference.moving import MovingReference, ScoreTable
from fasttr.training.run import Run, say


def start(config: TrainConfig) -> Run:
    """Read data and models, announce what was found, and take up a checkpoint when asked to."""
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    bf16 = config.bf16 if config.bf16 is not None else device.type == "cuda"
    if config.bf16 is None and device.type == "cpu":
        say("bf16: absent, and there is no GPU: computing in float32")
    torch.manual_seed(config.seed)
    if config.tf32 is not None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.tf32 else "ieee"
    if config.full_determinism:
        from transformers import enable_full_determinism

        enable_full_determinism(config.seed)
    require_trackers(config.report_to)
    folder = _resume_folder(config)
    state = checkpoint.load_state(folder) if folder is not None else None
    # What cannot be trained stops before any data is read.
    model_config = load_config(config.model_name_or_path, config.model_revision)
    if not config.disable_dropout and (rates := dropout_rates(model_config)):
        raise FasttrError(
            f"disable_dropout: got false and the model has {', '.join(rates)}; it is off in both "
            "models: leave it out"
        )
    tokenizer = load_tokenizer(config.model_name_or_path, config.model_revision)
    mixture = None
    if config.datasets:
        parts = parse_parts(config.datasets)
        mixture = read_mixture(parts, test_split_size=config.test_split_size, seed=config.seed)
    train_rows = load_rows(
        config, tokenizer, config.dataset_name, config.dataset_train_split, mixture
    )
    if config.loss_type is None:
        unpaired = train_rows.completion_lengths.shape[1] == 1
        config = dataclasses.replace(config, loss_type="kto" if unpaired else "sigmoid")
        say(f"loss_type: absent; the rows mean {config.loss_type}")
    config = dataclasses.replace(config, max_tokens_per_batch=config.token_budget(device))
    if state is not None and (changed := config.differences(state.facts["config"])):
        raise FasttrError(
            f"resume_from_checkpoint: {folder} was made with another configuration "
            f"({'; '.join(changed)}); "
            "use the same, or start over in another output_dir"
        )
    loss = config.loss
    train_trees = as_loss_reads(train_rows, config)
    eval_trees = None
    if config.eval_strategy != "no" or config.eval_on_start:
        other = config.eval_dataset_name
        split = (
            "train" if other is not None and Path(other).is_file() else config.dataset_test_split
        )
        eval_rows = load_rows(
            config, tokenizer, other or config.dataset_name, split, None if other else mixture
        )
        eval_trees = as_loss_reads(eval_rows, config)
    if state is not None and state.facts["data"] != train_trees.fingerprint:
        raise FasttrError(
            f"resume_from_checkpoint: the rows of {train_rows.report.name} are not those {folder} "
            "was made on"
        )

    seed = config.seed if config.data_seed is None else config.data_seed
    plan = Plan(
        train_trees,
        config.train_batch_size,
        config.num_train_epochs,
        config.max_steps,
        seed,
        config.token_budget(device),
        config.train_sampling_strategy == "random",
        config.group_rows,
        (config.group_size or config.train_batch_size) if config.dataloader_drop_last else 1,
    )
    if plan.rows_per_epoch == 0:
        raise FasttrError(
            f"dataloader_drop_last: {len(train_trees)} rows do not fill one batch of "
            f"{plan.multiple_of}; leave it out"
        )
    _announce(config, plan)

    liger = config.use_liger_kernel
    if liger is None:
        liger = liger_is_usable(config.model_name_or_path, device)
    options: dict[str, Any] = {
        "device": device,
        "bf16": bf16,
        "attn_implementation": config.attn_implementation,
        "max_length": config.max_length,
        "use_liger_kernel": liger,
        "ld_alpha": config.ld_alpha,
    }
    policy = load_model(
        str(folder or config.model_name_or_path),
        gradient_checkpointing=config.gradient_checkpointing,
        revision=config.model_revision,
        **options,
    )
    initial = None
    if config.ref_model_name_or_path is not None and (state is None or config.ref_update == "soft"):
        initial = load_model(config.ref_model_name_or_path, **options)
    optimizer = adamw(
        policy.model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    anchored = eval_trees is not None and loss.needs_reference
    run = Run(
        config=config,
        device=device,
        bf16=bf16,
        tokenizer=tokenizer,
        loss=loss,
        train_trees=train_trees,
        eval_trees=eval_trees,
        plan=plan,
        policy=policy,
        reference=MovingReference(config.schedule, policy, initial),
        optimizer=optimizer,
        scheduler=schedule(
            optimizer,
            config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            total_steps=plan.total_steps,
            kwargs=config.lr_scheduler_kwargs,
        ),
        scores=ScoreTable(len(train_trees), loss.completions),
        eval_scores=ScoreTable(len(eval_trees), loss.completions)
        if anchored and eval_trees is not None
        else None,
        anchor=ScoreTable(len(eval_trees), loss.completions)
        if anchored and eval_trees is not None
        else None,
        averages=Averages(device),
        total_loss=torch.zeros((), device=device),
    )
    if state is not None:
        run.restore(state)
        say(f"resumed from {folder} at step {run.step}")
    return run


def _resume_folder(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start in a folder that holds no run."""
    asked, output_dir = config.resume_from_checkpoint, Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise FasttrError(f"output_dir: {output_dir} is a file; wanted a folder")
    found = checkpoint.list_checkpoints(output_dir)
    if isinstance(asked, str):
        return Path(asked)
    if asked:
        if not found:
            say(
                f"resume_from_checkpoint: {output_dir} holds no checkpoint yet; starting from the "
                "beginning"
            )
        return found[-1] if found else None
    if found and not config.overwrite_output_dir:
        raise FasttrError(
            f"output_dir: {output_dir} already holds {found[-1].name}; pass "
            "--resume_from_checkpoint true to go on, "
            "--overwrite_output_dir true to start over, or another output_dir"
        )
    for old in found:
        shutil.rmtree(old)
    return None


def as_loss_reads(trees: TreeSet, config: TrainConfig) -> TreeSource:
    """The rows in the shape of the loss: pairs, chosen sides, or unpaired rows with their
    mismatched completions."""
    loss, sides = config.loss, trees.completion_lengths.shape[1]
    if loss.unpaired:
        block = config.group_rows if loss.completions > 1 else None
        return Unpaired(trees, labels=trees.labels, block=block, max_length=config.max_length)
    if sides < loss.completions:
        raise FasttrError(
            f"dataset: got unpaired rows; wanted pairs (chosen, rejected) for {config.loss_name}"
        )
    return trees


def load_rows(
    config: TrainConfig,
    tokenizer: Any,
    name: str | None,
    split: str,
    mixture: dict[str, Any] | None,
) -> TreeSet:
    """Read and tokenise one split, of a data set or of a mixture, and say what was found."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    loss_ = (
        config.loss
    )  # what is loaded does not depend on it, unless it reads the chosen side alone
    chosen_alone = loss_.completions == 1 and not loss_.unpaired
    hidden = config.disable_tqdm or not sys.stderr.isatty()
    (disable_progress_bar if hidden else enable_progress_bar)()
    name = "datasets" if mixture is not None else str(name)
    data = DataConfig(
        name=name,
        config=config.dataset_config,
        split=split,
        dataset_format=config.dataset_format,
        max_length=config.max_length,
        weight_column=config.weight_column,
        sides=1 if chosen_alone else 2,
        max_dropped_fraction=config.max_dropped_fraction,
        max_boundary_mismatch=config.max_boundary_mismatch,
        num_proc=config.dataset_num_proc,
    )
    if mixture is None:
        trees = load_trees(tokenizer, data)
    elif split in mixture:
        trees = encode_rows(tokenizer, mixture[split], data)
    else:
        raise FasttrError(
            f"dataset_test_split: got {split!r}; a mixture has {', '.join(map(repr, mixture))}"
        )
    for line in trees.report.lines():
        say(line)
    return trees


def _announce(config: TrainConfig, plan: Plan) -> None:
    steps, trees = plan.total_steps, plan.source
    every_row = np.arange(len(trees))
    shared = plan.tokens(every_row)
    sides = trees.completion_lengths.shape[1]
    unshared = shared + (sides - 1) * int(trees.prompt_lengths.sum(dtype=np.int64))
    per_step = shared / plan.steps_per_epoch
    epochs = steps / plan.steps_per_epoch
    say(
        f"{steps} steps of {config.train_batch_size} rows ({epochs:.2f} epochs of "
        f"{plan.steps_per_epoch} steps)"
    )
    say(
        f"tokens per step: {per_step:,.0f} packed, {unshared / plan.steps_per_epoch:,.0f} with "
        "prompts repeated"
    )
    schedule_ = config.schedule
    if not config.loss.needs_reference:
        say(f"reference: none, {config.loss_name} has no use for one")
        return
    updates = schedule_.updates(steps)
    say(
        f"reference: {config.ref_update}, {updates} updates planned, mean age "
        f"{schedule_.mean_age(steps):.1f} steps"
    )
    if schedule_.every is not None and updates == 0:
        say(
            f"WARNING: the reference will never move: ref_update_every is {schedule_.every} and "
            f"the run has {steps} "
            "steps; lower ref_update_every"
        )
    if config.warmup_steps >= steps and config.warmup_steps >= 1:
        say(
            f"WARNING: warmup_steps {config.warmup_steps:g} covers all {steps} steps: the full "
            "rate is never reached"
        )
