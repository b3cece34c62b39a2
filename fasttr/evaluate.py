"""Evaluation on a split: loss and metrics against the window's reference, and against the initial policy.

Values against a moving reference restart at every update and cannot be compared over a run; those under `anchor/`
can, since the initial policy does not move.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fasttr.batch import PackedBatch
from fasttr.losses import group_loss
from fasttr.metrics import SUMS, binomial_stderr, means, named, pack_sums
from fasttr.plan import pack_rows
from fasttr.run import Run

BLOCK = 64  # rows packed together


def pack_split(run: Run) -> Iterator[PackedBatch]:
    """The packs of the evaluation split, the same at every evaluation."""
    assert run.eval_trees is not None
    for first in range(0, len(run.eval_trees), BLOCK):
        rows = np.arange(first, min(first + BLOCK, len(run.eval_trees)))
        yield from pack_rows(run.eval_trees, rows, run.config.max_tokens_per_batch)


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Means over all rows of the split, under `eval_` names."""
    trees, loss = run.eval_trees, run.loss
    assert trees is not None
    per_row_tokens = run.mean_chosen_tokens(trees, np.arange(len(trees)))
    sums = torch.zeros(len(SUMS), device=run.device)
    anchored: list[torch.Tensor] = []
    for host_batch in pack_split(run):
        batch = host_batch.to(run.device)
        loss_fn = group_loss(loss, batch.token_counts, batch.weights, per_row_tokens)
        ref_logp = run.eval_scores.get(batch.rows).to(run.device) if run.eval_scores is not None else None
        out = run.policy(batch, loss_fn, ref_logp, normalizer=len(trees), stats=True)
        sums += pack_sums(out, ref_logp, batch, loss.beta, loss.completions)
        if run.anchor is not None:
            anchored.append(out.logp - run.anchor.get(batch.rows).to(run.device))
    values = means(sums).tolist()
    line = named(values, reference=loss.needs_reference, pairs=loss.completions > 1, prefix="eval_")
    if loss.needs_reference:
        line["eval_rewards/accuracies_stderr"] = binomial_stderr(line["eval_rewards/accuracies"], len(trees))
    if anchored:
        pairs = torch.cat(anchored).view(-1, loss.completions)
        chosen, rejected = pairs[:, 0], pairs[:, 1]
        line |= {
            "eval_anchor/logratios/chosen": float(chosen.mean()),
            "eval_anchor/logratios/rejected": float(rejected.mean()),
            "eval_anchor/rewards/margins": loss.beta * float((chosen - rejected).mean()),
            "eval_anchor/rewards/accuracies": float((chosen > rejected).float().mean()),
        }  # fmt: skip
        share = line["eval_anchor/rewards/accuracies"]
        line["eval_anchor/rewards/accuracies_stderr"] = binomial_stderr(share, len(trees))
    return line


def due(run: Run, step: int, strategy: str, every: int) -> bool:
    """Whether something with that strategy (no, steps, epoch) happens after `step` steps."""
    if strategy == "steps":
        return step % every == 0
    return strategy == "epoch" and step % run.plan.steps_per_epoch == 0
