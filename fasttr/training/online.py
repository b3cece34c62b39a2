"""On-policy training: draw completions, reward them, and take steps on them; `fasttr grpo`, `fasttr
rloo` and `fasttr ppo`.

A checkpoint is written only where a rollout is used up. There weights, optimizer, reference and
critic are all that the rest of the run depends on, so a run that was killed while it generated goes
on as if it had not been.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasttr.config.online_config import OnlineConfig
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.losses.policy_gradient import PolicyLoss, TokenInputs, clipping
from fasttr.metrics.log import MetricsLog
from fasttr.metrics.throughput import Throughput
from fasttr.models.policy import policy_loss
from fasttr.optim.update import begin_step
from fasttr.packing.plan import unshared_tokens
from fasttr.training import checkpoints
from fasttr.training.announce import announce_step
from fasttr.training.callbacks import Callback, Callbacks
from fasttr.training.critic import ValueSums
from fasttr.training.experience import Collector, Experience
from fasttr.training.intervals import Intervals
from fasttr.training.loop import save_and_leave
from fasttr.training.online_setup import OnlineRun, set_up
from fasttr.training.pace import Pace
from fasttr.training.step import StepMetrics, finish_step
from fasttr.training.stopping import FiniteGuard, StopSignal, check_weights
from fasttr.training.whole_run import TrainResult, to_the_end


def train_online(
    config: OnlineConfig,
    *,
    reward_funcs: Sequence[Any] = (),
    train_dataset: Any = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a policy on its own completions as `config` says.

    Writes checkpoints, metrics.jsonl and the final model into `config.output_dir`.

    Args:
        reward_funcs: functions of TRL's signature, after the sources that `config` names; then
            `config.reward_funcs` may be ["given"].
        train_dataset: a `datasets.Dataset` or a list of dicts with a column `prompt`, instead of
            `dataset_name`.
        callbacks: see `fasttr.Callback`; of its methods on_train_begin, on_step, on_move, on_save
            and on_train_end are called.

    Raises as `fasttr.train` does.
    """
    missing = []
    if config.model_name_or_path is None:
        missing.append("model_name_or_path (a folder or a hub id)")
    if config.dataset_name is None and train_dataset is None:
        missing.append("dataset_name (rows with a prompt)")
    if missing:
        raise FasttrError(f"missing: {'; '.join(missing)}; --help lists all settings")
    return to_the_end(
        config, lambda _: set_up(config, reward_funcs, train_dataset), callbacks, _OnlineLoop
    )


def policy_step(run: OnlineRun, experience: Experience, within: int) -> StepMetrics:
    """Forward and backward over one step of a rollout, then one update."""
    collector: Collector = run.collector
    config = collector.config
    loss = config.policy_loss
    prompts = collector.plan.places(within)
    counted = np.arange(len(experience.rollout.trees)) if loss.counts_rollout else prompts
    tokens = experience.kept_tokens(counted) * len(prompts) / len(counted)
    completions = len(prompts) * config.num_generations
    normalizer = loss.normalizer(completions, tokens)
    found = _StepSums(loss)
    packs = list(collector.packs(experience.rollout, within))
    begin_step(run.optimizer, len(packs))
    critic = run.critic
    if critic is not None:
        critic.begin_step(len(packs))
    for host_batch in packs:
        batch = host_batch.to(run.device)

        def loss_fn(logp: Tensor, rows: slice, those: slice, batch: Any = batch) -> Tensor:
            return loss(experience.inputs(batch, logp, rows, those))

        out = policy_loss(
            run.policy,
            batch,
            loss_fn,
            temperature=config.temperature,
            normalizer=normalizer,
            stats=True,
        )
        out.loss.backward()
        everything = experience.inputs(batch, out.token_logp, slice(None), slice(None))
        found.add(out, everything)
        if critic is not None:
            keep = everything.spread(everything.keep)
            found.add_values(critic.backward(batch, *experience.of_critic(batch), keep, normalizer))
    trees = experience.rollout.trees
    run.num_tokens += unshared_tokens(trees, prompts, config.num_generations)
    values = experience.metrics | found.means()
    ledger: Any = run.ledger
    done = finish_step(run, ledger.vector(values).to(run.device))
    if critic is None:
        return done
    of_critic = critic.finish_step(torch.tensor(values["value_loss"], device=run.device))
    is_broken = torch.maximum(done.is_broken, of_critic.is_broken.to(torch.float32))
    return done._replace(is_broken=is_broken)


class _StepSums:
    """What the packs of a step add up to."""

    def __init__(self, loss: PolicyLoss):
        self._loss = loss
        names = ("loss", "entropy", "tokens", "kl", "low", "high", "kept", "value", "value_clipped")
        self._sums = dict.fromkeys(names, 0.0)
        self._low_min, self._high_max = float("inf"), float("-inf")

    @torch.no_grad()
    def add(self, out: Any, inputs: TokenInputs) -> None:
        keep = inputs.spread(inputs.keep)
        clipped = clipping(self._loss, inputs)
        found = {
            "loss": out.loss.detach(),
            "entropy": (out.entropy * keep).sum(),
            "tokens": keep.sum(),
            "low": clipped.low,
            "high": clipped.high,
            "kept": clipped.kept,
        }
        if self._loss.reads_reference:
            old_logp = inputs.logp if inputs.old_logp is None else inputs.old_logp
            ratio = self._loss.ratios(inputs, inputs.logp - old_logp)
            ratio_t = ratio.ratio if ratio.by_token else inputs.spread(ratio.ratio)
            found["kl"] = (self._loss.kl(inputs, ratio_t) * keep).sum()
        for name, value in found.items():
            self._sums[name] += float(value)
        self._low_min = min(self._low_min, float(clipped.low_min))
        self._high_max = max(self._high_max, float(clipped.high_max))

    def add_values(self, sums: ValueSums) -> None:
        self._sums["value"] += float(sums.loss)
        self._sums["value_clipped"] += float(sums.clipped)

    def means(self) -> dict[str, float]:
        sums = self._sums
        tokens, kept = max(sums["tokens"], 1.0), max(sums["kept"], 1.0)
        found = {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / tokens,
            "clip_ratio/low_mean": sums["low"] / kept,
            "clip_ratio/high_mean": sums["high"] / kept,
            "clip_ratio/region_mean": (sums["low"] + sums["high"]) / kept,
            "clip_ratio/low_min": self._low_min,
            "clip_ratio/high_max": self._high_max,
        }
        if self._loss.reads_reference:
            found["kl"] = sums["kl"] / tokens
        if self._loss.loss_type == "ppo":
            found["value_loss"] = sums["value"] / tokens
            found["value_clip_ratio"] = sums["value_clipped"] / tokens
        return found


class _OnlineLoop:
    """The loop of a run on rollouts."""

    def __init__(self, run: OnlineRun, log: MetricsLog, stop: StopSignal, callbacks: Callbacks):
        self.run = run
        self.log = log
        self.stop = stop
        self.callbacks = callbacks
        self.intervals = Intervals.of(run.config, run.plan)
        self.guard = FiniteGuard(run.output_dir)
        self.throughput = Throughput(run.policy.model, run.device)
        self.pace = Pace(run.step)
        self.line_at = time.perf_counter()
        self.generating = 0.0  # seconds since the last line
        self.last_line: dict[str, float] = {}

    def all_steps(self) -> TrainResult:
        run, plan = self.run, self.run.collector.plan
        self.callbacks.on_train_begin(run)
        bar = tqdm(
            total=plan.total_steps,
            initial=run.step,
            desc="Training",
            unit="step",
            disable=run.config.disable_tqdm or None,
        )
        with bar:
            while run.step < plan.total_steps:
                self.pace.step_begins()
                since = time.perf_counter()
                experience = run.collector.collect(run.step // plan.steps_per_rollout)
                self.generating += time.perf_counter() - since
                if self.stop.signum is not None:
                    save_and_leave(run, self.callbacks, self.stop.signum)

                first = run.step
                for within in range(min(plan.steps_per_rollout, plan.total_steps - first)):
                    self.take_step(experience, within)
                    bar.update()
                run.collector.used_up(experience)

                # once in a while: save, where the rollout is used up
                is_due = any(self.intervals.saves(step + 1) for step in range(first, run.step))
                if is_due or "save" in run.requests:
                    self.save()
                if self.stop.signum is not None:
                    self.guard.verify()
                    save_and_leave(run, self.callbacks, self.stop.signum)
                if "stop" in run.requests:
                    break
        return self.finish()

    def take_step(self, experience: Experience, within: int) -> None:
        run = self.run
        with self.throughput.step():
            metrics = policy_step(run, experience, within)
        run.step += 1
        self.guard.verify()
        rows = run.trees.positions[run.plan.rows(run.step - 1)]
        self.guard.note(run.step, rows, metrics.is_broken)
        run.averages.add(metrics.micro_means.cpu())
        run.total_loss += metrics.micro_means[0, 0]
        self.callbacks.on_step(run, metrics)

        # once in a while: a line of metrics
        if self.intervals.logs(run.step):
            self.write_line(metrics)

        # once in a while: the reference moves
        reference: Any = run.reference
        if reference.moves_after(run.step):
            reference.move(run.policy, run.optimizer)
            self.callbacks.on_move(run)

    def write_line(self, metrics: StepMetrics) -> None:
        run = self.run
        reference: Any = run.reference
        line = run.ledger.metrics(run.averages.read())
        line["grad_norm"] = float(metrics.gradient_norm)
        line["learning_rate"] = metrics.learning_rate
        line["num_tokens"] = run.num_tokens
        line["epoch"] = run.step / max(run.plan.steps_per_epoch, 1)
        if reference.model is not None:
            line["ref/updates"] = reference.updates
        now = time.perf_counter()
        line["perf/generation_share"] = self.generating / max(now - self.line_at, 1e-9)
        self.generating, self.line_at = 0.0, now
        self.guard.verify()
        self.log.write(run.step, line)
        announce_step(run, line, self.pace)
        self.last_line = line

    def save(self) -> None:
        self.guard.verify()
        self.run.requests.discard("save")
        if self.run.config.save_only_model:
            checkpoints.save_model_alone(self.run, self.callbacks)
        else:
            checkpoints.save(self.run, self.callbacks)

    def finish(self) -> TrainResult:
        run = self.run
        self.guard.verify()
        check_weights(dict(run.policy.model.named_parameters()), run.output_dir)
        if run.critic is not None:
            check_weights(dict(run.critic.model.model.named_parameters()), run.output_dir)
        checkpoints.save_final(run)
        self.callbacks.on_train_end(run)
        totals = {
            "train_loss": float(run.total_loss) / max(run.step, 1),
            "train_runtime": self.pace.elapsed,
        }
        self.log.write(run.step, totals)
        say(f"done: {run.step} steps in {totals['train_runtime']:.1f} s; all in {run.output_dir}")
        metrics = self.last_line | totals
        return TrainResult(
            run.output_dir, run.step, metrics, run.policy.trained_model, run.tokenizer
        )
