"""The training loop.

For each window of steps between two moves of the reference: score the window's rows, train on them,
move the reference. At a step where several fall together: evaluate, move, save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from fasttr.config import rules
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.metrics.log import MetricsLog, NoLog
from fasttr.metrics.throughput import Throughput
from fasttr.optim.adamw import PLATEAU, after_evaluation
from fasttr.training import checkpoints
from fasttr.training.announce import announce_step
from fasttr.training.best import value_of
from fasttr.training.callbacks import Callback, Callbacks
from fasttr.training.completions import Completions
from fasttr.training.evaluating import evaluate_splits
from fasttr.training.intervals import Intervals
from fasttr.training.pace import Pace
from fasttr.training.run import REQUESTS, Run
from fasttr.training.setup import Given, setup
from fasttr.training.step import StepMetrics, train_step
from fasttr.training.stopping import (
    FiniteGuard,
    Interrupted,
    StillnessWatch,
    StopSignal,
    check_weights,
)
from fasttr.training.whole_run import TrainResult, to_the_end
from fasttr.training.window import SweepStopped, score_anchor, score_late, score_window


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    loss: Any = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a model on preferences as `config` says; the command `fasttr train` calls this.

    Writes checkpoints, metrics.jsonl and the final model into `config.output_dir`.

    Args:
        model: a loaded transformers model, trained in place, instead of `model_name_or_path`.
        tokenizer: its tokenizer; by default that of the model's own folder or hub id.
        train_dataset, eval_dataset: a `datasets.Dataset` or `IterableDataset`, a list of dicts
            with the columns of a preference set, or a TreeSource, instead of `dataset_name` and its
            test split; to evaluate on also a mapping of names to such rows.
        loss: a `fasttr.losses.Loss`, or any function of `LossInputs` that returns a number for each
            row, instead of `loss_type`.
        callbacks: see `fasttr.Callback`.

    Raises FasttrError, one line, for mistakes in configuration, data or model; Interrupted (a
    SystemExit) after SIGTERM or Ctrl-C, once the run is saved.
    """
    rules.check_sources(
        config,
        has_model=model is not None,
        has_data=train_dataset is not None,
        has_eval_data=eval_dataset is not None,
    )
    given = Given(model, tokenizer, train_dataset, eval_dataset, loss)
    return to_the_end(
        config, lambda ranks: setup(config, given, ranks), callbacks, Loop, takes_ranks=True
    )


class Loop:
    """The parts of a loop that live as long as it runs, and what happens once in a while."""

    def __init__(self, run: Run, log: MetricsLog | NoLog, stop: StopSignal, callbacks: Callbacks):
        self.run = run
        self.log = log
        self.stop = stop
        self.callbacks = callbacks
        self.intervals = Intervals.of(run.config, run.plan)
        self.guard = FiniteGuard(run.output_dir)
        self.throughput = Throughput(run.policy.model, run.device, tier=run.policy.tier)
        self.stillness = StillnessWatch()
        self.last_line: dict[str, float] = {}
        self.pace = Pace(run.step)
        self.completions = Completions.of(run)
        self.began_step = run.step
        self._agreed_signum = 0

    def all_steps(self) -> TrainResult:
        run, plan, schedule = self.run, self.run.plan, self.run.config.schedule
        self.callbacks.on_train_begin(run)
        if run.step == 0:
            score_anchor(run)
            self.sample()
        bar = tqdm(
            total=plan.total_steps,
            initial=run.step,
            desc="Training",
            unit="step",
            disable=run.config.disable_tqdm or not run.ranks.is_first or None,
        )
        with bar:
            for window in plan.windows(schedule.every, start=run.step):
                self.score(window)  # the only place where the reference's weights are used
                self.pace.step_begins()

                for step in window[run.step - window.start :]:
                    is_last = (
                        schedule.every is not None and step + 1 == window.start + schedule.every
                    )
                    with self.throughput.step():
                        metrics = train_step(run, step, self.throughput, moves=is_last)
                    run.step = step + 1
                    self.take_note(step, metrics)
                    self.agree()
                    bar.update()

                    # once in a while: a line of metrics
                    if self.intervals.logs(run.step):
                        self.write_line(metrics, window)

                    # once in a while: evaluate, against the reference of this window
                    is_saved = self.intervals.saves(run.step) or "save" in run.requests
                    if self.intervals.evaluates(run.step) or "evaluate" in run.requests:
                        is_saved |= self.evaluate(is_saved)

                    # once in a while: samples of the same prompts
                    self.sample()

                    # the window is over: the reference moves
                    if is_last:
                        self.move()

                    # once in a while: save
                    if is_saved or "save" in run.requests:
                        self.save()

                    if self.signum is not None:
                        self.save_and_leave(self.signum)
                    if "stop" in run.requests:
                        return self.finish()
        return self.finish()

    def score(self, window: range) -> None:
        """The reference's log-probs of the window's rows, unless a checkpoint brought them."""
        run = self.run
        begins = window.start == 0 and run.config.eval_on_start
        evaluates = begins or any(self.intervals.evaluates(step + 1) for step in window)
        evaluates |= self.callbacks.may_evaluate
        if run.loss.needs_reference:
            try:
                if not run.window_scored:
                    score_window(run, window, evaluates=evaluates, stop=self.stop)
                else:
                    score_late(run, window, evaluates=evaluates)
            except SweepStopped:
                assert self.stop.signum is not None
                self.save_and_leave(self.stop.signum)
            self.callbacks.on_window(run, window)
        if run.step == 0 and run.config.eval_on_start:
            self.evaluate(is_saved=False)

    def take_note(self, step: int, metrics: StepMetrics) -> None:
        """Read the flag of the step before, and keep this one's numbers on the device."""
        run = self.run
        self.guard.verify()
        self.guard.note(run.step, run.trees.positions[run.plan.rows(step)], metrics.is_broken)
        run.averages.add(metrics.micro_means)
        run.total_loss += metrics.micro_means[0, 0]
        self.stillness.note(metrics.gradient_norm)
        self.callbacks.on_step(run, metrics)

    def agree(self) -> None:
        """What a signal or a callback asks of one rank, it asks of all of them; and whether a
        checkpoint is written."""
        run = self.run
        asked = [int(request in run.requests) for request in REQUESTS]
        is_writing = run.pending is not None and not run.pending.writing.is_done
        found = run.ranks.largest([*asked, int(is_writing), self.stop.signum or 0])
        *asked, is_writing_somewhere, self._agreed_signum = found
        if not is_writing_somewhere:
            checkpoints.settle(run, self.callbacks)
        run.requests |= {
            request for request, is_asked in zip(REQUESTS, asked, strict=True) if is_asked
        }

    @property
    def signum(self) -> int | None:
        """The signal that stops the run; among several ranks one that all of them know of."""
        return self.stop.signum if self.run.ranks.world == 1 else self._agreed_signum or None

    def write_line(self, metrics: StepMetrics, window: range) -> None:
        run = self.run
        line = run.ledger.metrics(run.averages.read())
        line["grad_norm"] = float(metrics.gradient_norm)
        line["learning_rate"] = metrics.learning_rate
        line["num_tokens"] = run.num_tokens
        line["epoch"] = run.plan.epochs(run.step)
        if run.loss.needs_reference:
            line["ref/updates"] = run.reference.updates
            line["ref/age_steps"] = run.step - 1 - window.start
        line |= self.throughput.read(run.ranks)
        self.guard.verify()
        self.log.write(run.step, line)
        announce_step(run, line, self.pace)
        self.stillness.warn(run.step)
        self.last_line = line

    def evaluate(self, is_saved: bool) -> bool:
        """Evaluate; whether that calls for a checkpoint."""
        run = self.run
        run.requests.discard("evaluate")
        if not run.splits:
            raise FasttrError(
                "evaluate: a callback asks for it and there are no rows; give eval_strategy and "
                "rows to evaluate on"
            )
        lacks_reference = any(split.lacks_reference() for split in run.splits.values())
        if run.loss.needs_reference and lacks_reference:
            raise FasttrError(
                "evaluate: a callback asks for it in a window that was scored without the "
                "evaluation rows; set may_evaluate = True on the callback"
            )
        line = evaluate_splits(run)
        self.log.write(run.step, line)
        self.callbacks.on_evaluate(run, line)
        if run.config.lr_scheduler_type == PLATEAU:
            after_evaluation(run.scheduler, value_of(line, run.config.best_metric))
        if run.patience is not None and run.patience.is_over(line):
            say(f"early stopping: {run.patience.explained()}")
            run.ask("stop")
        if run.best is None or not (is_saved or run.best.saves_itself):
            return False
        return run.best.note(line, run.step) and run.best.saves_itself

    def sample(self, at_once: bool = False) -> None:
        """Draw what `log_completions` asks for, where it is due."""
        completions = self.completions
        if completions is not None and (at_once or completions.is_due(self.run)):
            self.log.write(self.run.step, completions.draw(self.run))

    def move(self) -> None:
        run = self.run
        run.reference.move()
        run.window_scored = False
        line = {"event": "reference_update", "ref/updates": run.reference.updates}
        if run.reference.dropped is not None:
            line["ref/lora_dropped"] = run.reference.dropped
        self.log.write(run.step, line)
        self.callbacks.on_move(run)

    def save(self) -> None:
        self.guard.verify()
        self.run.requests.discard("save")
        if self.run.config.save_only_model:
            checkpoints.save_model_alone(self.run, self.callbacks)
        else:
            checkpoints.save(self.run, self.callbacks)

    def save_and_leave(self, signum: int) -> None:
        self.guard.verify()
        save_and_leave(self.run, self.callbacks, signum)

    def finish(self) -> TrainResult:
        run = self.run
        self.guard.verify()
        with run.ranks.together():
            check_weights(run.policy.local_parameters(), run.output_dir)
        if self.completions is not None and self.completions.drawn_at != run.step:
            self.sample(at_once=True)
        checkpoints.settle(run, self.callbacks)
        checkpoints.save_final(run)
        self.callbacks.on_train_end(run)
        totals = self._totals()
        self.log.write(run.step, totals)
        say(
            f"done: {run.step} steps in {totals['train_runtime']:.1f} s "
            f"({totals['train_pairs_per_second']:.2f} rows/s, scoring and saving included)"
        )
        if run.device.type == "cuda" and run.memory is not None:
            planned = run.memory.bytes.peak / 2**30
            found = self.last_line.get("memory/peak_gib", 0.0)
            say(f"memory: {found:.1f} GiB at most, {planned:.1f} were planned")
        say(f"model and metrics in {run.output_dir}")
        metrics = self.last_line | totals
        return TrainResult(
            run.output_dir, run.step, metrics, run.policy.trained_model, run.tokenizer
        )

    def _totals(self) -> dict[str, float]:
        run = self.run
        seconds = self.pace.elapsed
        rows = sum(len(run.plan.rows(step)) for step in range(self.began_step, run.step))
        return {
            "train_loss": float(run.total_loss) / max(run.step, 1),
            "train_runtime": seconds,
            "train_pairs_per_second": rows / seconds,
        }


def save_and_leave(run: Run, callbacks: Callbacks, signum: int) -> None:
    """Save where there is something to save, and end the process as the signal asks."""
    saved = f"; saved {checkpoints.save(run, callbacks)}" if run.step > 0 else ""
    say(f"stopped by a signal at step {run.step}{saved}; go on with --resume_from_checkpoint true")
    raise Interrupted(signum)
