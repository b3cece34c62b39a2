"""Scoring a window: the reference's log-probs of every row that the window trains on, beforehand.

A first sweep (all of them, when the reference is fixed) may be long: it is saved now and then and
taken up again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fasttr.batch import PackedBatch
from fasttr.checkpoint.state import weights_digest
from fasttr.config.train_config import TrainConfig
from fasttr.console import Progress, say
from fasttr.distributed.ranks import Ranks
from fasttr.errors import FasttrError, one_line
from fasttr.evaluation.split import EvaluationSplit
from fasttr.files import remove_torn, written_aside
from fasttr.models.packed import PackedModel
from fasttr.reference.logp_table import LogpTable, fill_logps
from fasttr.training.run import Run
from fasttr.training.stopping import StopSignal

PARTIAL_FILE = "reference_scores.partial.safetensors"
PARTIAL_SECONDS = 30.0
LONG_SWEEP = 16  # steps from which a sweep has a bar


class SweepStopped(Exception):
    """A signal came while a window was scored; what is known so far is on disk."""


def score_window(run: Run, window: range, *, evaluates: bool, stop: StopSignal) -> None:
    """Fill the tables with the reference's log-probs of the window's rows.

    `evaluates`: an evaluation falls into the window, so the evaluation split is scored too. Raises
    SweepStopped after a signal, once the weights of the policy are back in their place.
    """
    run.window_logps.clear()
    steps = range(run.step, window.stop)
    with run.reference.model() as reference:
        partial = _Partial.of(run, reference) if window.start == 0 else None
        _sweep(run, reference, steps, partial, stop)
        if evaluates:
            _score_splits(run, reference)
    run.reference.window_scored()
    run.window_scored = True
    if partial is not None and run.ranks.is_first:
        partial.remove()


def score_anchor(run: Run) -> None:
    """Score the evaluation splits by the policy as it is now: the initial one, before any step."""
    for split in run.splits.values():
        if split.anchor_logps is not None:
            _fill_split(run, split, run.policy, split.anchor_logps)


def score_late(run: Run, window: range, *, evaluates: bool) -> None:
    """Score what a resumed run needs of its window and the checkpoint does not bring.

    Inside a window only a soft reference still has the weights that it began with, and a fixed one
    that was read again.
    """
    steps = range(run.step, window.stop)
    if not steps:
        return
    lacks_rows = any(run.window_logps.lacks(run.plan.rows(step)) for step in steps)
    splits = [split for split in run.splits.values() if evaluates and split.lacks_reference()]
    if not lacks_rows and not splits:
        return
    if run.reference.weights is None and not run.reference.is_apart:
        raise FasttrError(
            f"an evaluation falls into the window of step {run.step + 1}, which was scored without "
            "it, and the reference's weights of its start are gone; resume with the intervals that "
            "the run began with, or from a checkpoint where a window begins"
        )
    with run.reference.model() as reference:
        if run.reference.is_apart:
            _require_same_scores(run, reference)
        _sweep(run, reference, steps, None, StopSignal())
        for split in splits:
            _score_split(run, split, reference)
    run.reference.window_scored()


def _require_same_scores(run: Run, reference: PackedModel) -> None:
    """FasttrError where a reference that was read again gives other log-probs to the first rows
    than those that the run went by."""
    allowed = 2e-2 if reference.bf16 else 1e-3
    for batch in run.packs(0):
        found = reference.logps(batch).cpu().double()
        known = run.window_logps.get(batch.rows).double()
        if not bool(((found - known).abs() <= allowed * (1 + known.abs())).all()):
            config = run.config
            name = config.ref_model_name_or_path or config.model_name_or_path
            raise FasttrError(
                f"max_steps: {name} is to score the rows that the run did not reach before, and it "
                "gives other log-probs to its first ones than the reference did; wanted the same "
                "model, or a new run"
            )


def _sweep(
    run: Run, reference: PackedModel, steps: range, partial: _Partial | None, stop: StopSignal
) -> None:
    hides_bar = run.config.disable_tqdm or len(steps) < LONG_SWEEP
    progress = Progress("scoring by the reference", len(steps), "step", hides_bar=hides_bar)
    sweep = _Sweep(run, partial, stop)

    def packs() -> Iterator[PackedBatch]:
        # Known by the plan: a rank's own table lacks what the others have scored.
        is_known = np.zeros(len(run.trees), dtype=bool)
        is_known[run.window_logps.known_rows()] = True
        for step in steps:
            rows = run.plan.rows(step)
            if not is_known[rows].all():
                yield from run.packs(step)
                is_known[rows] = True
                sweep.after_step()
            progress.update()

    with progress:
        fill_logps(reference, packs(), run.window_logps, sweep.after_pack)
    run.window_logps.merge(rows_of(run, steps), run.ranks)


def rows_of(run: Run, steps: range) -> np.ndarray:
    """The rows that some steps train on, each once."""
    found = [run.plan.rows(step) for step in steps]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


class _Sweep:
    """What stops a sweep, and keeps what it has found: after a pack, or where ranks have to agree
    after a step."""

    def __init__(self, run: Run, partial: _Partial | None, stop: StopSignal):
        self.run, self.partial, self.stop = run, partial, stop

    def after_pack(self) -> None:
        if self.run.ranks.world == 1:
            is_due = self.partial is not None and self.partial.is_due()
            self._act(is_due, self.stop.signum is not None)

    def after_step(self) -> None:
        ranks = self.run.ranks
        if ranks.world == 1:
            return
        # The clock of the first rank decides for all, a signal to any of them.
        is_due = ranks.is_first and self.partial is not None and self.partial.is_due()
        is_due_somewhere, signum = ranks.largest([int(is_due), self.stop.signum or 0])
        self.stop.signum = signum or None
        self._act(bool(is_due_somewhere), signum != 0)

    def _act(self, is_due: bool, is_stopped: bool) -> None:
        if self.partial is not None and (is_due or is_stopped):
            self.partial.save()
        if is_stopped:
            raise SweepStopped


def _score_splits(run: Run, reference: PackedModel) -> None:
    for split in run.splits.values():
        _score_split(run, split, reference)


def _score_split(run: Run, split: EvaluationSplit, reference: PackedModel) -> None:
    if split.ref_logps is None:
        return
    split.ref_logps.clear()
    if run.step == 0 and split.anchor_logps is not None and run.reference.is_the_policy:
        split.ref_logps.values[:] = split.anchor_logps.values
    else:
        _fill_split(run, split, reference, split.ref_logps)


def _fill_split(run: Run, split: EvaluationSplit, model: PackedModel, table: LogpTable) -> None:
    hides_bar = run.config.disable_tqdm
    with Progress("scoring held-out rows", len(split.trees), "row", hides_bar=hides_bar) as bar:

        def packs() -> Iterator[PackedBatch]:
            for batch in split.packs(run.ranks):
                yield batch
                bar.update(len(batch.rows) * run.ranks.world)

        fill_logps(model, packs(), table)
    table.merge(np.arange(len(split.trees)), run.ranks)


class _Partial:
    """The log-probs of an unfinished first sweep, on disk until the same run starts again."""

    def __init__(self, path: Path, table: LogpTable, key: str, ranks: Ranks):
        self.path, self.table, self.key, self.ranks = path, table, key, ranks
        self.saved_at = time.perf_counter()

    @classmethod
    def of(cls, run: Run, reference: PackedModel) -> _Partial:
        path = run.output_dir / PARTIAL_FILE
        partial = cls(path, run.window_logps, _key(run, reference), run.ranks)
        if run.config.resume_from_checkpoint and partial.path.is_file():
            partial.take_up()
        return partial

    def take_up(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return
                rows, logp = file.get_tensor("rows").numpy(), file.get_tensor("logp").numpy()
        except (SafetensorError, OSError) as error:
            say(f"{self.path} cannot be read and is left out: {one_line(error)}")
            return
        self.table.values[rows] = logp
        say(f"taking up the reference's log-probs of {len(rows)} rows from {self.path}")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        remove_torn(self.path.parent, PARTIAL_FILE)

    def is_due(self) -> bool:
        return time.perf_counter() - self.saved_at > PARTIAL_SECONDS

    def save(self) -> None:
        """Write what all ranks have found; each of them calls this."""
        self.table.merge(np.arange(len(self.table.values)), self.ranks)
        with self.ranks.together():
            if self.ranks.is_first:
                self._write()
        self.saved_at = time.perf_counter()

    def _write(self) -> None:
        rows = torch.from_numpy(self.table.known_rows())
        logp = torch.from_numpy(self.table.values[rows.numpy()])
        try:
            with written_aside(self.path) as aside:
                save_file({"rows": rows, "logp": logp}, aside, metadata={"key": self.key})
        except (OSError, SafetensorError) as error:
            raise FasttrError(f"cannot write {self.path}: {one_line(error)}") from error


def _key(run: Run, reference: PackedModel) -> str:
    """Everything that a log-prob depends on, and that binds a resumed run."""
    values = run.config.as_dict()
    bound = {name: values[name] for name in TrainConfig.bound_on_resume()}
    identity = [run.trees.fingerprint, weights_digest(reference), run.policy.bf16, bound]
    return json.dumps(identity, sort_keys=True, default=str)
