"""Everything a run holds, from its configuration to a state that can be saved and taken up again."""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasttr import checkpoint
from fasttr.batch import TreeSource
from fasttr.config import TrainConfig
from fasttr.data import DataConfig, TreeSet, load_trees
from fasttr.errors import FasttrError
from fasttr.logps import PackedModel
from fasttr.losses import Loss
from fasttr.metrics import SUMS
from fasttr.model import load_config, load_model, load_tokenizer
from fasttr.optim import adamw, schedule
from fasttr.plan import Plan
from fasttr.reference import MovingReference, ScoreTable


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
    loss: Loss
    train_trees: TreeSet
    eval_trees: TreeSet | None
    plan: Plan
    policy: PackedModel
    reference: MovingReference
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scores: ScoreTable  # of the reference, for the rows of the current window
    eval_scores: ScoreTable | None  # of the reference, for the evaluation split
    anchor: ScoreTable | None  # of the initial policy, for the evaluation split
    resumed: bool = False
    step: int = 0  # optimizer steps done
    window_scored: bool = False
    num_tokens: int = 0
    logged_sums: Tensor = field(default_factory=lambda: torch.zeros(len(SUMS)))  # since the last line
    logged_steps: int = 0
    total_loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def mean_chosen_tokens(self, trees: TreeSource, rows: np.ndarray) -> float:
        """Scored tokens of the first completion, per row. Without a prompt its first token is not scored."""
        scored = trees.completion_lengths[rows, 0] - (trees.prompt_lengths[rows] == 0)
        return max(float(scored.mean()), 1e-9)

    def save(self) -> Path:
        """Write checkpoint-STEP and return it."""
        tensors = {"logged_sums": self.logged_sums, "total_loss": self.total_loss, "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        tables = {"scores": self.scores, "eval_scores": self.eval_scores, "anchor": self.anchor}
        for name, table in tables.items():
            if table is not None and len(rows := table.rows()):
                tensors[f"{name}.rows"] = torch.from_numpy(rows)
                tensors[f"{name}.logp"] = torch.from_numpy(table.values[rows])
        facts = {
            "step": self.step, "updates": self.reference.updates, "window_scored": self.window_scored,
            "num_tokens": self.num_tokens, "logged_steps": self.logged_steps, "config": self.config.as_dict(),
            "data": self.train_trees.fingerprint, "bf16": self.bf16,
        }  # fmt: skip
        soft = self.reference.model
        state = checkpoint.RunState(
            facts,
            tensors,
            checkpoint.optimizer_tensors(self.optimizer),
            {} if soft is None else checkpoint.weights(soft),
        )
        keep = self.config.save_total_limit
        return checkpoint.save_checkpoint(self.output_dir, self.step, self.policy, self.tokenizer, state, keep)

    def restore(self, state: checkpoint.RunState) -> None:
        """Take up a saved state; the policy's weights have been read from the same folder."""
        facts, tensors = state.facts, state.tensors
        self.resumed = True
        self.step, self.reference.updates = facts["step"], facts["updates"]
        self.window_scored, self.num_tokens = facts["window_scored"], facts["num_tokens"]
        self.logged_steps = facts["logged_steps"]
        self.logged_sums = tensors["logged_sums"].to(self.device)
        self.total_loss = tensors["total_loss"].to(self.device)
        torch.set_rng_state(tensors["rng"])
        if self.device.type == "cuda" and "rng_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng_cuda"], self.device)
        for name, table in {"scores": self.scores, "eval_scores": self.eval_scores, "anchor": self.anchor}.items():
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


def start(config: TrainConfig) -> Run:
    """Read data and models, announce what was found, and take up a checkpoint when asked to."""
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    bf16 = config.bf16 if config.bf16 is not None else device.type == "cuda"
    if config.bf16 is None and device.type == "cpu":
        say("bf16: absent, and there is no GPU: computing in float32")
    torch.manual_seed(config.seed)
    if config.full_determinism:
        from transformers import enable_full_determinism

        enable_full_determinism(config.seed)
    folder = _resume_folder(config)
    state = checkpoint.load_state(folder) if folder is not None else None
    if state is not None and (changed := config.differences(state.facts["config"])):
        raise FasttrError(
            f"resume_from_checkpoint: {folder} was made with another configuration ({'; '.join(changed)}); "
            "use the same, or start over in another output_dir"
        )

    loss = config.loss
    load_config(config.model_name_or_path)  # what cannot be trained stops before any data is read
    tokenizer = load_tokenizer(config.model_name_or_path)
    train_trees = _load(config, tokenizer, config.dataset_name, config.dataset_train_split)
    eval_trees = None
    if config.eval_strategy != "no" or config.eval_on_start:
        name = config.eval_dataset_name or config.dataset_name
        separate_file = config.eval_dataset_name is not None and Path(name).is_file()
        eval_trees = _load(config, tokenizer, name, "train" if separate_file else config.dataset_test_split)
    if state is not None and state.facts["data"] != train_trees.fingerprint:
        raise FasttrError(
            f"resume_from_checkpoint: the rows of {config.dataset_name} are not those {folder} was made on"
        )

    seed = config.seed if config.data_seed is None else config.data_seed
    plan = Plan(train_trees, config.train_batch_size, config.num_train_epochs, config.max_steps, seed,
                config.max_tokens_per_batch)  # fmt: skip
    _announce(config, plan)

    liger = config.use_liger_kernel
    options: dict[str, Any] = {
        "device": device, "bf16": bf16, "attn_implementation": config.attn_implementation,
        "max_length": config.max_length, "use_liger_kernel": _liger_is_there(device) if liger is None else liger,
    }  # fmt: skip
    policy = load_model(
        str(folder or config.model_name_or_path), gradient_checkpointing=config.gradient_checkpointing, **options
    )
    initial = None
    if config.ref_model_name_or_path is not None and (state is None or config.ref_update == "soft"):
        initial = load_model(config.ref_model_name_or_path, **options)
    optimizer = adamw(policy.model, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
                      betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)  # fmt: skip
    anchored = eval_trees is not None and loss.needs_reference
    run = Run(
        config=config, device=device, bf16=bf16, tokenizer=tokenizer, loss=loss, train_trees=train_trees,
        eval_trees=eval_trees, plan=plan, policy=policy,
        reference=MovingReference(config.schedule, policy, initial), optimizer=optimizer,
        scheduler=schedule(optimizer, config.lr_scheduler_type, warmup_steps=config.warmup_steps,
                           total_steps=plan.total_steps, kwargs=config.lr_scheduler_kwargs),
        scores=ScoreTable(len(train_trees), loss.completions),
        eval_scores=ScoreTable(len(eval_trees), loss.completions) if anchored and eval_trees is not None else None,
        anchor=ScoreTable(len(eval_trees), loss.completions) if anchored and eval_trees is not None else None,
        logged_sums=torch.zeros(len(SUMS), device=device), total_loss=torch.zeros((), device=device),
    )  # fmt: skip
    if state is not None:
        run.restore(state)
        say(f"resumed from {folder} at step {run.step}")
    return run


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of all parameters that is cheap for large models: names, shapes, sums and sums of magnitudes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        sums = (float(p.detach().double().sum()), float(p.detach().double().abs().sum()))
        digest.update(repr((name, tuple(p.shape), sums)).encode())
    return digest.hexdigest()


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
            say(f"resume_from_checkpoint: {output_dir} holds no checkpoint yet; starting from the beginning")
        return found[-1] if found else None
    if found and not config.overwrite_output_dir:
        raise FasttrError(
            f"output_dir: {output_dir} already holds {found[-1].name}; pass --resume_from_checkpoint true to go on, "
            "--overwrite_output_dir true to start over, or another output_dir"
        )
    for old in found:
        shutil.rmtree(old)
    return None


def _load(config: TrainConfig, tokenizer: Any, name: str, split: str) -> TreeSet:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    loss = config.loss
    hidden = config.disable_tqdm or not sys.stderr.isatty()
    (disable_progress_bar if hidden else enable_progress_bar)()
    trees = load_trees(
        tokenizer,
        DataConfig(
            name=name, config=config.dataset_config, split=split, dataset_format=config.dataset_format,
            max_length=config.max_length, weight_column=config.weight_column, sides=loss.completions,
            max_dropped_fraction=config.max_dropped_fraction, max_boundary_mismatch=config.max_boundary_mismatch,
            num_proc=config.dataset_num_proc,
        ),
    )  # fmt: skip
    got = trees.completion_lengths.shape[1]
    if got < loss.completions:
        raise FasttrError(
            f"dataset_name: {name} has {got} completion a row; wanted pairs (chosen, rejected) for {config.loss_type}"
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
    say(f"{steps} steps of {config.train_batch_size} rows ({epochs:.2f} epochs of {plan.steps_per_epoch} steps)")
    say(f"tokens per step: {per_step:,.0f} packed, {unshared / plan.steps_per_epoch:,.0f} with prompts repeated")
    schedule_ = config.schedule
    if not config.loss.needs_reference:
        say(f"reference: none, {config.loss_type} has no use for one")
        return
    updates = schedule_.updates(steps)
    say(f"reference: {config.ref_update}, {updates} updates planned, mean age {schedule_.mean_age(steps):.1f} steps")
    if schedule_.every is not None and updates == 0:
        say(
            f"WARNING: the reference will never move: ref_update_every is {schedule_.every} and the run has {steps} "
            "steps; lower ref_update_every"
        )
    if config.warmup_steps >= steps and config.warmup_steps >= 1:
        say(f"WARNING: warmup_steps {config.warmup_steps:g} covers all {steps} steps: the full rate is never reached")


def _liger_is_there(device: torch.device) -> bool:
    from importlib.util import find_spec

    return device.type == "cuda" and find_spec("liger_kernel") is not None
