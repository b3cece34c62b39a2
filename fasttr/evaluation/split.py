"""Evaluation on a split: loss and metrics against the window's reference, and against the initial
policy.

Values against a moving reference restart at every update and cannot be compared over a run; those
under `anchor/` can, since the initial policy does not move.

Legend: N completions of a pack, B rows, m completions of a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch, TreeSource
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.losses import Loss
from fasttr.losses.objective import AnyObjective, Objective
from fasttr.metrics.ledger import Ledger
from fasttr.metrics.sums import binomial_stderr, by_name
from fasttr.models.packed import PackedModel
from fasttr.packing.plan import Plan, pack_rows
from fasttr.packing.tiers import SHARED
from fasttr.reference.logp_table import LogpTable

BLOCK = 64  # rows packed together, about


@dataclass(frozen=True)
class EvaluationSplit:
    """The rows of an evaluation, and what is known of them before it."""

    trees: TreeSource
    max_tokens_per_batch: int
    group_rows: int = 1
    tier: str = SHARED
    cuts: bool = False  # as those of a plan
    ref_logps: LogpTable | None = None  # of the window's reference
    anchor_logps: LogpTable | None = None  # of the initial policy
    objective: AnyObjective | None = None  # None: what the run trains on

    @classmethod
    def of(
        cls, trees: TreeSource, loss: Loss, plan: Plan, group_size: int | None = None
    ) -> EvaluationSplit:
        """A split that is packed as the training rows of `plan` are, but that a loss which couples
        rows sees `group_size` of them together."""
        group_rows = plan.group_rows
        if loss.coupled and group_size is not None:
            group_rows = group_size
        budget, objective = plan.max_tokens_per_batch, Objective(loss, average_over=group_size)
        split = cls(trees, budget, group_rows, plan.tier, cuts=plan.cuts, objective=objective)
        return split.with_tables(loss) if loss.needs_reference else split

    def with_tables(self, loss: Loss) -> EvaluationSplit:
        tables = [LogpTable(len(self.trees), loss.completions) for _ in range(2)]
        return dataclasses.replace(self, ref_logps=tables[0], anchor_logps=tables[1])

    def lacks_reference(self) -> bool:
        """Whether the window's reference has not scored all rows."""
        return self.ref_logps is not None and self.ref_logps.lacks(range(len(self.trees)))

    def packs(self, ranks: Ranks = ALONE) -> Iterator[PackedBatch]:
        """The same packs at every evaluation; among several ranks, this one's share of them."""
        block = max(BLOCK // self.group_rows, 1) * self.group_rows
        for first in range(0, len(self.trees), block):
            rows = np.arange(first, min(first + block, len(self.trees)))
            yield from pack_rows(
                self.trees,
                rows,
                self.max_tokens_per_batch,
                self.group_rows,
                tier=self.tier,
                ranks=ranks,
                cuts=self.cuts,
            )


@torch.no_grad()
def evaluate(
    model: PackedModel,
    split: EvaluationSplit,
    objective: AnyObjective,
    ledger: Ledger,
    after: Callable[[PackedBatch, Any], None] | None = None,
    name: str = "",
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Means over all rows of the split, under `eval_` names, or `eval_NAME_` where it has a name;
    the same on every rank.

    `after` is called after every pack with the model's output of it.
    """
    loss, rows = objective.loss, np.arange(len(split.trees))
    step = objective.of_rows(split.trees, rows)
    sums = ledger.zeros(model.device)
    found: list[tuple[tuple[int, ...], Tensor]] = []
    with model.weights_still():
        for host_batch in split.packs(ranks):
            batch = host_batch.to(model.device)
            if not batch.rows:
                model(batch)
                continue
            ref_logp = None
            if split.ref_logps is not None:
                ref_logp = split.ref_logps.get(batch.rows).to(model.device)
            out = model(
                batch,
                step.loss_fn(batch),
                ref_logp,
                normalizer=step.normalizer,
                stats=True,
                head_means=step.head_means,
            )
            sums = ledger.merged(sums, ledger.of_pack(out, ref_logp, batch))
            if split.anchor_logps is not None:
                found.append((batch.rows, out.logp))
            if after is not None:
                after(batch, out)
    ranks.sum_([sums])
    line = ledger.metrics(by_name(ledger.means(sums)[0], ledger.names))
    for share in ("rewards/accuracies", "accuracy"):
        if share in line:
            line[f"{share}_stderr"] = binomial_stderr(line[share], len(rows))
    if split.anchor_logps is not None:
        logps = LogpTable(len(rows), loss.completions)
        for batch_rows, logp in found:
            logps.put(batch_rows, logp)
        logps.merge(rows, ranks)
        logratio_Bm = torch.from_numpy(logps.values - split.anchor_logps.values)
        line.update(_AgainstAnchor(split.trees, logratio_Bm).metrics(loss))
    prefix = f"eval_{name}_" if name else "eval_"
    return {prefix + metric: value for metric, value in line.items()}


class _AgainstAnchor(NamedTuple):
    """Log-ratios to the initial policy; chosen and rejected as in `fasttr.metrics.sums`."""

    trees: TreeSource
    logratio_Bm: Tensor

    def metrics(self, loss: Loss) -> dict[str, float]:
        chosen, rejected = self._sides(loss)
        found = {}
        if len(chosen):
            found["logratios/chosen"] = float(chosen.mean())
        if len(rejected):
            found["logratios/rejected"] = float(rejected.mean())
        if len(chosen) and len(rejected):
            found["rewards/margins"] = loss.beta * float(chosen.mean() - rejected.mean())
        if loss.completions > 1 and not loss.unpaired:
            share = float((chosen > rejected).float().mean())
            found["rewards/accuracies"] = share
            found["rewards/accuracies_stderr"] = binomial_stderr(share, len(chosen))
            if len(chosen) > 1:
                spread = float((chosen - rejected).double().std())
                found["rewards/margins_stderr"] = loss.beta * spread / math.sqrt(len(chosen))
        return {f"anchor/{name}": value for name, value in found.items()}

    def _sides(self, loss: Loss) -> tuple[Tensor, Tensor]:
        if not loss.unpaired:
            return self.logratio_Bm[:, 0], self.logratio_Bm[:, 1:2].flatten()
        label_B = torch.as_tensor(self.trees.labels)  # type: ignore[attr-defined]
        return self.logratio_Bm[label_B, 0], self.logratio_Bm[~label_B, 0]
