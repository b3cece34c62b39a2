"""Scoring a window: the reference's log-probs of every row that the window trains on, before it
trains.

A first sweep (all of them, when the reference is fixed) may be long: it is saved now and then and
taken up again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from fasttr.batch import PackedBatch
from fasttr.reference.moving import score_packs
from fasttr.training.evaluate import pack_split
from fasttr.training.run import Run, say, weights_digest
from fasttr.training.stopping import Interrupted

PARTIAL = "reference_scores.partial.safetensors"
PARTIAL_SECONDS = 30.0


def score_window(run: Run, window: range, stop_if_asked: Callable[[], None]) -> None:
    """Fill the tables with the reference's log-probs of the window's rows, and of the evaluation
    split if it is due."""
    run.scores.clear()
    partial = _Partial(run) if window.start == 0 else None
    scorer = run.reference.scorer()
    steps = range(run.step, window.stop)
    long = len(steps) >= 16
    bar = tqdm(
        total=len(steps),
        desc="Scoring the reference",
        unit="step",
        leave=False,
        disable=(run.config.disable_tqdm or None) if long else True,
    )

    def packs() -> Iterator[PackedBatch]:
        for step in steps:
            if run.scores.missing(run.plan.rows(step)):
                yield from run.plan.packs(step)
            bar.update()

    def after(_: PackedBatch) -> None:
        if partial is not None:
            partial.save_now_and_then()
        stop_if_asked()

    try:
        score_packs(scorer, packs(), run.scores, after)
    except Interrupted:
        if partial is not None:
            partial.save()
        raise
    finally:
        bar.close()
    if run.eval_scores is not None and _evaluation_falls_into(run, window):
        run.eval_scores.clear()
        if scorer is run.policy and run.step == 0 and run.anchor is not None:
            run.eval_scores.values[:] = run.anchor.values
        else:
            score_packs(scorer, pack_split(run), run.eval_scores)
    run.reference.window_scored()
    run.window_scored = True
    if partial is not None:
        partial.path.unlink(missing_ok=True)


class _Partial:
    """The scores of an unfinished first sweep on disk, taken up when the same run starts again."""

    def __init__(self, run: Run):
        self.run, self.path, self.saved = run, run.output_dir / PARTIAL, time.perf_counter()
        config = run.config
        order = [
            config.seed,
            config.data_seed,
            config.train_batch_size,
            run.plan.max_tokens_per_batch,
            run.bf16,
        ]
        self.key = json.dumps(
            [run.train_trees.fingerprint, weights_digest(run.reference.scorer()), order]
        )
        if run.config.resume_from_checkpoint and self.path.is_file():
            from safetensors import safe_open

            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("key") == self.key:
                    rows = file.get_tensor("rows").numpy()
                    run.scores.values[rows] = file.get_tensor("logp").numpy()
                    say(f"taking up the reference's scores of {len(rows)} rows from {self.path}")

    def save_now_and_then(self) -> None:
        if time.perf_counter() - self.saved > PARTIAL_SECONDS:
            self.save()

    def save(self) -> None:
        from safetensors.torch import save_file

        rows = torch.from_numpy(self.run.scores.rows())
        aside = self.path.with_suffix(".tmp")
        logp = torch.from_numpy(self.run.scores.values[rows.numpy()])
        save_file({"rows": rows, "logp": logp}, aside, metadata={"key": self.key})
        os.replace(aside, self.path)
        self.saved = time.perf_counter()


def score_anchor(run: Run) -> None:
    """Score the evaluation split by the policy as it is now: the initial one, when called before
    the first step."""
    if run.anchor is not None:
        score_packs(run.policy, pack_split(run), run.anchor)


def _evaluation_falls_into(run: Run, window: range) -> bool:
    at_start = window.start == 0 and run.config.eval_on_start
    return at_start or any(run.cadence.evaluates(step + 1) for step in window)
