"""Evaluation on a split: loss and metrics against the window's reference, and against the initial
policy.

Values against a moving reference restart at every update and cannot be compared over a run; those
under `anchor/` can, since the initial policy does not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from fasttr.batch import PackedBatch
from fasttr.losses import Loss, Weighted
from fasttr.metrics.sums import SUMS, binomial_stderr, means, named, pack_sums
from fasttr.packing.plan import pack_rows
from fasttr.reference.moving import ScoreTable
from fasttr.training.run import Run

BLOCK = 64  # rows packed together, about


def pack_split(run: Run) -> Iterator[PackedBatch]:
    """The packs of the evaluation split, the same at every evaluation."""
    assert run.eval_trees is not None
    group = run.plan.group_rows
    block = max(BLOCK // group, 1) * group
    for first in range(0, len(run.eval_trees), block):
        rows = np.arange(first, min(first + block, len(run.eval_trees)))
        yield from pack_rows(run.eval_trees, rows, run.plan.max_tokens_per_batch, group)


@torch.no_grad()
def evaluate(
    run: Run, packs: Iterable[PackedBatch] | None = None, keep: ScoreTable | None = None
) -> dict[str, float]:
    """Means over all rows of the split, under `eval_` names.

    `packs`: those of `pack_split`, when somebody watches them go by; `keep` takes the policy's
    log-probs.
    """
    trees, loss = run.eval_trees, run.loss
    assert trees is not None
    chosen_tokens = run.chosen_tokens_means(trees, np.arange(len(trees)))
    sums = torch.zeros(len(SUMS), device=run.device)
    anchored: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for host_batch in pack_split(run) if packs is None else packs:
        batch = host_batch.to(run.device)
        ref_logp = (
            run.eval_scores.get(batch.rows).to(run.device) if run.eval_scores is not None else None
        )
        out = run.policy(
            batch, run.loss_fn(batch, chosen_tokens), ref_logp, normalizer=len(trees), stats=True
        )
        sums += pack_sums(out, ref_logp, batch, loss)
        if keep is not None:
            keep.put(batch.rows, out.logp)
        if run.anchor is not None:
            anchored.append(out.logp - run.anchor.get(batch.rows).to(run.device))
            labels.append(batch.labels)
    line = named(means(sums).tolist(), loss, prefix="eval_")
    if "eval_rewards/accuracies" in line:
        line["eval_rewards/accuracies_stderr"] = binomial_stderr(
            line["eval_rewards/accuracies"], len(trees)
        )
    if anchored:
        line |= _anchored(torch.cat(anchored).view(-1, loss.completions), torch.cat(labels), loss)
    return line


def _anchored(
    logratio_BM: torch.Tensor, label_B: torch.Tensor, loss: Loss | Weighted
) -> dict[str, float]:
    """Metrics of the log-ratios to the initial policy; chosen and rejected as in
    `fasttr.metrics`."""
    if loss.unpaired:
        chosen, rejected = logratio_BM[label_B, 0], logratio_BM[~label_B, 0]
    else:
        chosen, rejected = logratio_BM[:, 0], logratio_BM[:, 1]
    name = "eval_anchor/"
    line = {}
    if len(chosen):
        line[name + "logratios/chosen"] = float(chosen.mean())
    if len(rejected):
        line[name + "logratios/rejected"] = float(rejected.mean())
    if len(chosen) and len(rejected):
        line[name + "rewards/margins"] = loss.beta * float(chosen.mean() - rejected.mean())
    if not loss.unpaired:
        share = float((chosen > rejected).float().mean())
        line[name + "rewards/accuracies"] = share
        line[name + "rewards/accuracies_stderr"] = binomial_stderr(share, len(chosen))
    return line
