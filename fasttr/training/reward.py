"""`fasttr reward`: the training loop on scores.

A run is one of `fasttr.training.loop` with a model that gives scores, an objective that reads them
and a ledger that counts them; it has no reference, so its one window is never scored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fasttr import files
from fasttr.batch import TreeSource
from fasttr.config import rules
from fasttr.config.reward_config import RewardConfig
from fasttr.config.reward_rows import RankedReader
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.evaluation.split import EvaluationSplit
from fasttr.memory.plan import NO_REFERENCE
from fasttr.metrics.ledger import RewardLedger
from fasttr.metrics.sums import Averages
from fasttr.metrics.trackers import require_trackers
from fasttr.models.checks import check_ids
from fasttr.models.halves import add_remainders
from fasttr.models.load import ModelConfig
from fasttr.models.reward import (
    CALIBRATION,
    RewardModel,
    choose_padding,
    load_reward_model,
    score_all,
    scoring_model,
    set_padding,
)
from fasttr.models.vocabulary import rows_wanted
from fasttr.packing.ahead import PacksAhead
from fasttr.packing.plan import Plan
from fasttr.packing.tiers import SHARED
from fasttr.reference.logp_table import LogpTable
from fasttr.reference.moving import MovingReference
from fasttr.reference.schedule import Fixed
from fasttr.training.announce import announce_plan
from fasttr.training.best import Best, Patience
from fasttr.training.callbacks import Callback
from fasttr.training.checkpoints import Resume, check_resume, find_resume, take_up
from fasttr.training.loop import Loop
from fasttr.training.memory import Rows, plan_memory
from fasttr.training.run import Run
from fasttr.training.setup import Given, checked_tokenizer, prepare_torch
from fasttr.training.whole_run import TrainResult, to_the_end


def train_reward(
    config: RewardConfig,
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a reward model as `config` says; the command `fasttr reward` calls this.

    Writes checkpoints, metrics.jsonl and the final model, a folder that transformers and TRL read,
    into `config.output_dir`; with `calibration_dataset_name` also reward_calibration.json.

    Args:
        train_dataset, eval_dataset: a `datasets.Dataset` or a list of dicts with chosen and
            rejected, or with completions (best first), instead of `dataset_name` and its test
            split.
        callbacks: see `fasttr.Callback`.

    Raises as `fasttr.train` does.
    """
    rules.check_sources(
        config,
        has_model=False,
        has_data=train_dataset is not None,
        has_eval_data=eval_dataset is not None,
    )
    given = Given(train_dataset=train_dataset, eval_dataset=eval_dataset)
    return to_the_end(
        config, lambda _: _set_up(config, given), [*callbacks, _Calibrate(config)], Loop
    )


def _set_up(config: RewardConfig, given: Given) -> Run:
    """Read rows and the model, say what was found, and take up a checkpoint when asked to."""
    device = prepare_torch(config)
    require_trackers(config.report_to)
    resume = find_resume(config)
    source = str(resume.folder) if resume is not None else config.model_name_or_path
    if resume is not None:
        config = config.as_planned_in(resume.state.facts["config"])
    tokenizer = checked_tokenizer(config, given, device, source)
    config = dataclasses.replace(config, attention_tier=SHARED)
    reader = RankedReader(config, tokenizer)
    trees = reader.train(given.train_dataset)
    split_trees = reader.evaluation(given.eval_dataset) if config.evaluates else None
    m = trees.completion_lengths.shape[1]
    if split_trees is not None and split_trees.completion_lengths.shape[1] != m:
        raise FasttrError(
            f"eval_dataset_name: its rows have {split_trees.completion_lengths.shape[1]} "
            f"completions; wanted {m}, as the rows to train on"
        )
    objective = config.reward_objective(m)
    loss: Any = objective.loss
    splits: list[TreeSource] = [trees] if split_trees is None else [trees, split_trees]
    of_policy = dataclasses.replace(config.model(device), name=str(source))
    config, _ = plan_memory(
        config,
        device,
        of_policy.read(),
        Rows.of(config, splits, config.group_rows(loss)),
        reference=NO_REFERENCE,
        build=scoring_model,
    )
    plan = config.plan(trees, loss, device)
    if resume is not None:
        check_resume(resume, config, loss, plan)
    announce_plan(config, loss, plan)
    _require_padding(tokenizer, config, trees)
    wanted = config.model(device)
    if config.resize_embeddings:
        wanted = dataclasses.replace(wanted, embedding_rows=rows_wanted(tokenizer))
    policy = _model(wanted, config.seed, resume)
    for rows in (trees, split_trees):
        if rows is not None:
            key, name = "model_name_or_path", str(config.model_name_or_path)
            check_ids(policy, rows.largest_id, key, name)
    set_padding(policy, tokenizer)
    optimizer = config.optimizer().optimizer(policy.model, policy.bf16)
    ledger = RewardLedger(objective.loss, has_weights=config.weight_column is not None)
    run = Run(
        config=config,
        device=device,
        tokenizer=tokenizer,
        objective=objective,
        ledger=ledger,
        trees=trees,
        plan=plan,
        packs=PacksAhead(plan.packs, plan.total_steps),
        policy=policy,
        reference=MovingReference(Fixed(), policy),
        optimizer=optimizer,
        scheduler=config.optimizer().scheduler(optimizer, plan.total_steps),
        window_logps=LogpTable(0, m),
        splits=_splits(split_trees, plan),
        best=Best.of(config),
        patience=Patience.of(config),
        averages=Averages(device, ledger.names),
        total_loss=torch.zeros((), device=device),
    )
    if resume is not None:
        take_up(run, resume)
    return run


def _require_padding(tokenizer: Any, config: RewardConfig, trees: TreeSource) -> None:
    has_own = tokenizer.pad_token not in (None, tokenizer.eos_token)
    used: set[int] = set()
    if not has_own and config.pad_token is None:
        for row in range(len(trees)):
            tree = trees[row]
            for ids in (tree.prompt_ids, *tree.completions):
                used.update(np.unique(ids).tolist())
    before = tokenizer.pad_token
    choose_padding(tokenizer, config.pad_token, used)
    if tokenizer.pad_token != before:
        say(f"pad_token: {tokenizer.pad_token!r}, since the score is read at EOS")


def _model(config: ModelConfig, seed: int, resume: Resume | None) -> RewardModel:
    if resume is None:
        return load_reward_model(config, seed)
    resumed = dataclasses.replace(config, name=str(resume.folder), revision="main")
    packed = load_reward_model(resumed)
    add_remainders(packed.model, resume.state.remainders)
    return packed


def _splits(trees: TreeSource | None, plan: Plan) -> dict[str, EvaluationSplit]:
    return {} if trees is None else {"": EvaluationSplit(trees, plan.max_tokens_per_batch)}


class _Calibrate(Callback):
    """Writes the mean score of responses that should score 0; the weights stay as they are."""

    def __init__(self, config: RewardConfig):
        self._config = config

    def on_train_end(self, run: Run) -> None:
        name = self._config.calibration_dataset_name
        if name is None:
            return
        trees = RankedReader(self._config, run.tokenizer).responses(name)
        assert isinstance(run.policy, RewardModel)
        scores = score_all(run.policy, trees, run.plan.max_tokens_per_batch)[:, 0]
        facts = {
            "mean": float(scores.mean(dtype=np.float64)),
            "std": float(scores.std(dtype=np.float64)),
            "rows": len(scores),
            "fingerprint": trees.fingerprint,
        }
        files.write_json(run.output_dir / CALIBRATION, facts)
        say(f"calibration: {facts['rows']} responses score {facts['mean']:.4f} on average")
