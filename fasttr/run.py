"""Everything a run holds, from its configuration to a state that can be saved and taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasttr import checkpoint
from fasttr.batch import PackedBatch, TreeSource
from fasttr.cadence import Cadence
from fasttr.config import TrainConfig
from fasttr.data import DataConfig, TreeSet, encode_rows, load_trees
from fasttr.errors import FasttrError
from fasttr.logps import LossFn, PackedModel
from fasttr.losses import Loss, Sft, Weighted, group_loss
from fasttr.metrics import Averages
from fasttr.mixture import parse_parts, read_mixture
from fasttr.model import dropout_rates, liger_is_usable, load_config, load_model, load_tokenizer
from fasttr.optim import adamw, schedule
from fasttr.plan import Plan
from fasttr.reference import MovingReference, ScoreTable
from fasttr.trackers import require_trackers
from fasttr.unpaired import Unpaired


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
    loss: Loss | Weighted
    train_trees: TreeSource
    eval_trees: TreeSource | None
    plan: Plan
    policy: PackedModel
    reference: MovingReference
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scores: ScoreTable  # of the reference, for the rows of the current window
    eval_scores: ScoreTable | None  # of the reference, for the evaluation split
    anchor: ScoreTable | None  # of the initial policy, for the evaluation split
    averages: Averages  # since the last line of metrics
    total_loss: Tensor  # () over all steps
    resumed: bool = False
    step: int = 0  # optimizer steps done
    window_scored: bool = False
    num_tokens: int = 0
    best: tuple[float, int] | None = None  # value of the metric and step of the best checkpoint

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.config, self.plan)

    @property
    def best_checkpoint(self) -> Path | None:
        return None if self.best is None else checkpoint.folder_of(self.output_dir, self.best[1])

    def note_best(self, evaluation: dict[str, float]) -> bool:
        """Whether an evaluation makes this step the best checkpoint, and with save_strategy best calls for one."""
        config = self.config
        if not config.load_best_model_at_end and config.save_strategy != "best":
            return False
        if config.best_metric not in evaluation:
            known = ", ".join(key for key in evaluation if not key.endswith("stderr"))
            raise FasttrError(
                f"metric_for_best_model: {config.best_metric} is not in this evaluation; wanted of {known}"
            )
        if config.save_strategy != "best" and not self.cadence.saves(self.step):
            return False
        value = evaluation[config.best_metric]
        better = self.best is None or (value > self.best[0] if config.more_is_better else value < self.best[0])
        if better:
            self.best = (value, self.step)
        return better and config.save_strategy == "best"

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def chosen_tokens_means(self, trees: TreeSource, rows: np.ndarray) -> dict[int, float]:
        """By row: the mean of scored chosen tokens over the rows that `sft` averages with it: its group, or all."""
        if not self.reads_sft:
            return dict.fromkeys(rows.tolist(), 1.0)
        # Without a prompt the first token is not scored.
        scored = trees.completion_lengths[rows, 0] - (trees.prompt_lengths[rows] == 0)
        size = self.config.group_size or len(rows)
        means = {}
        for first in range(0, len(rows), size):
            here = slice(first, first + size)
            means.update(dict.fromkeys(rows[here].tolist(), max(float(scored[here].mean()), 1e-9)))
        return means

    @property
    def reads_sft(self) -> bool:
        parts = self.loss.losses if isinstance(self.loss, Weighted) else (self.loss,)
        return any(isinstance(part, Sft) for part in parts)

    def loss_fn(self, batch: PackedBatch, chosen_tokens_means: dict[int, float]) -> LossFn:
        """The loss of one pack, which is on the device, as the head calls it."""
        mean: Tensor | float = 1.0
        if self.reads_sft:
            mean = torch.tensor([chosen_tokens_means[row] for row in batch.rows], device=batch.weights.device)
        return group_loss(
            self.loss, batch.token_counts, batch.weights, cu_rows=list(batch.cu_rows), labels=batch.labels,
            chosen_tokens_mean=mean,
        )  # fmt: skip

    def save(self, only_model: bool = False) -> Path:
        """Write checkpoint-STEP and return it; one with the model alone cannot be resumed from."""
        if only_model:
            return self._write_checkpoint(None)
        tensors = {"averages": self.averages.sums, "total_loss": self.total_loss, "rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        tables = {"scores": self.scores, "eval_scores": self.eval_scores, "anchor": self.anchor}
        for name, table in tables.items():
            if table is not None and len(rows := table.rows()):
                tensors[f"{name}.rows"] = torch.from_numpy(rows)
                tensors[f"{name}.logp"] = torch.from_numpy(table.values[rows])
        facts = {
            "step": self.step, "updates": self.reference.updates, "window_scored": self.window_scored,
            "num_tokens": self.num_tokens, "config": self.config.as_dict(),
            "data": self.train_trees.fingerprint, "bf16": self.bf16, "best": self.best,
        }  # fmt: skip
        soft = self.reference.model
        state = checkpoint.RunState(
            facts,
            tensors,
            checkpoint.optimizer_tensors(self.optimizer),
            {} if soft is None else checkpoint.weights(soft),
        )
        return self._write_checkpoint(state)

    def _write_checkpoint(self, state: checkpoint.RunState | None) -> Path:
        return checkpoint.save_checkpoint(
            self.output_dir, self.step, self.policy, self.tokenizer, state, self.config.save_total_limit,
            self.best_checkpoint,
        )  # fmt: skip

    def restore(self, state: checkpoint.RunState) -> None:
        """Take up a saved state; the policy's weights have been read from the same folder."""
        facts, tensors = state.facts, state.tensors
        self.resumed = True
        self.step, self.reference.updates = facts["step"], facts["updates"]
        self.window_scored, self.num_tokens = facts["window_scored"], facts["num_tokens"]
        self.best = tuple(facts["best"]) if facts.get("best") else None
        self.averages.sums = tensors["averages"].to(self.device)
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
            f"disable_dropout: got false and the model has {', '.join(rates)}; it is off in both models: leave it out"
        )
    tokenizer = load_tokenizer(config.model_name_or_path, config.model_revision)
    mixture = None
    if config.datasets:
        parts = parse_parts(config.datasets)
        mixture = read_mixture(parts, test_split_size=config.test_split_size, seed=config.seed)
    train_rows = _load(config, tokenizer, config.dataset_name, config.dataset_train_split, mixture)
    if config.loss_type is None:
        unpaired = train_rows.completion_lengths.shape[1] == 1
        config = dataclasses.replace(config, loss_type="kto" if unpaired else "sigmoid")
        say(f"loss_type: absent; the rows mean {config.loss_type}")
    if state is not None and (changed := config.differences(state.facts["config"])):
        raise FasttrError(
            f"resume_from_checkpoint: {folder} was made with another configuration ({'; '.join(changed)}); "
            "use the same, or start over in another output_dir"
        )
    loss = config.loss
    train_trees = _as_loss_reads(train_rows, config)
    eval_trees = None
    if config.eval_strategy != "no" or config.eval_on_start:
        other = config.eval_dataset_name
        split = "train" if other is not None and Path(other).is_file() else config.dataset_test_split
        eval_rows = _load(config, tokenizer, other or config.dataset_name, split, None if other else mixture)
        eval_trees = _as_loss_reads(eval_rows, config)
    if state is not None and state.facts["data"] != train_trees.fingerprint:
        raise FasttrError(
            f"resume_from_checkpoint: the rows of {train_rows.report.name} are not those {folder} was made on"
        )

    seed = config.seed if config.data_seed is None else config.data_seed
    plan = Plan(train_trees, config.train_batch_size, config.num_train_epochs, config.max_steps, seed,
                config.max_tokens_per_batch, config.train_sampling_strategy == "random", config.group_rows,
                (config.group_size or config.train_batch_size) if config.dataloader_drop_last else 1)  # fmt: skip
    if plan.rows_per_epoch == 0:
        raise FasttrError(
            f"dataloader_drop_last: {len(train_trees)} rows do not fill one batch of {plan.multiple_of}; leave it out"
        )
    _announce(config, plan)

    liger = config.use_liger_kernel
    if liger is None:
        liger = liger_is_usable(config.model_name_or_path, device)
    options: dict[str, Any] = {
        "device": device, "bf16": bf16, "attn_implementation": config.attn_implementation,
        "max_length": config.max_length, "use_liger_kernel": liger, "ld_alpha": config.ld_alpha,
    }  # fmt: skip
    policy = load_model(
        str(folder or config.model_name_or_path), gradient_checkpointing=config.gradient_checkpointing,
        revision=config.model_revision, **options,
    )  # fmt: skip
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
        averages=Averages(device), total_loss=torch.zeros((), device=device),
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


def _as_loss_reads(trees: TreeSet, config: TrainConfig) -> TreeSource:
    """The rows in the shape of the loss: pairs, chosen sides, or unpaired rows with their mismatched completions."""
    loss, sides = config.loss, trees.completion_lengths.shape[1]
    if loss.unpaired:
        block = config.group_rows if loss.completions > 1 else None
        return Unpaired(trees, labels=trees.labels, block=block, max_length=config.max_length)
    if sides < loss.completions:
        raise FasttrError(f"dataset: got unpaired rows; wanted pairs (chosen, rejected) for {config.loss_name}")
    return trees


def _load(config: TrainConfig, tokenizer: Any, name: str | None, split: str, mixture: dict[str, Any] | None) -> TreeSet:
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    loss_ = config.loss  # what is loaded does not depend on it, unless it reads the chosen side alone
    chosen_alone = loss_.completions == 1 and not loss_.unpaired
    hidden = config.disable_tqdm or not sys.stderr.isatty()
    (disable_progress_bar if hidden else enable_progress_bar)()
    name = "datasets" if mixture is not None else str(name)
    data = DataConfig(
        name=name, config=config.dataset_config, split=split, dataset_format=config.dataset_format,
        max_length=config.max_length, weight_column=config.weight_column, sides=1 if chosen_alone else 2,
        max_dropped_fraction=config.max_dropped_fraction, max_boundary_mismatch=config.max_boundary_mismatch,
        num_proc=config.dataset_num_proc,
    )  # fmt: skip
    if mixture is None:
        trees = load_trees(tokenizer, data)
    elif split in mixture:
        trees = encode_rows(tokenizer, mixture[split], data)
    else:
        raise FasttrError(f"dataset_test_split: got {split!r}; a mixture has {', '.join(map(repr, mixture))}")
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
        say(f"reference: none, {config.loss_name} has no use for one")
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
