"""An evaluation inside a run: every split measured, said, and kept row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasttr.batch import PackedBatch
from fasttr.console import Progress
from fasttr.evaluation.split import EvaluationSplit, evaluate
from fasttr.metrics.results import Results, write_results
from fasttr.reference.logp_table import LogpTable
from fasttr.training.announce import announce_evaluation
from fasttr.training.run import Run


def evaluate_splits(run: Run) -> dict[str, float]:
    """The metrics of all splits, under `eval_` names; the same on every rank."""
    line: dict[str, float] = {}
    for name, split in run.splits.items():
        found = _evaluate_split(run, name, split)
        announce_evaluation(run, found, name)
        line |= found
    run.last_evaluation = line
    return line


def _evaluate_split(run: Run, name: str, split: EvaluationSplit) -> dict[str, float]:
    loss, ranks = run.loss, run.ranks
    compares = split.anchor_logps is not None and loss.completions > 1 and not loss.unpaired
    logps = LogpTable(len(split.trees) if compares else 0, loss.completions)
    what = f"evaluating {name}".strip()
    hides_bar = run.config.disable_tqdm
    with Progress(what, len(split.trees), "row", hides_bar=hides_bar) as progress:

        def after(batch: PackedBatch, out: Any) -> None:
            if compares:
                logps.put(batch.rows, out.logp)
            progress.update(len(batch.rows) * ranks.world)

        objective = split.objective or run.objective
        found = evaluate(run.policy, split, objective, run.ledger, after, name, ranks)
    if compares:
        logps.merge(np.arange(len(split.trees)), ranks)
        if ranks.is_first:
            _keep_rows(run, name, split, logps)
    return found


def _keep_rows(run: Run, name: str, split: EvaluationSplit, logps: LogpTable) -> None:
    """Whether, and how far, each pair's chosen side gained more on the initial policy."""
    assert split.anchor_logps is not None
    logratio_Bm = logps.values.astype(np.float64) - split.anchor_logps.values
    gain_B = logratio_Bm[:, 0] - logratio_Bm[:, 1]
    ending = f"_{name}" if name else ""
    where = f" on {name}" if name else ""
    measured = (
        ("accuracy", "accuracy", gain_B > 0, 0.5),
        ("margin", "margin (nats)", run.loss.beta * gain_B, 0.0),
    )
    for kind, words, values_B, no_effect in measured:
        results = Results(
            name=f"{kind}{ending}",
            title=f"held-out {words}{where} against the initial policy",
            rows=split.trees.fingerprint,
            values=values_B.tolist(),
            step=run.step,
            no_effect=no_effect,
        )
        write_results(run.output_dir, results)
