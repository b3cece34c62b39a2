"""A loss that couples rows, when its rows lie on several ranks: two sweeps over the packs.

The first makes the log-probs of the whole step, without gradients. On those vectors every rank
computes the loss once, and its derivative by every log-prob. The second sweep differentiates
sum(derivative x log-prob), which is the same gradient: exact for any loss, and for groups of any
size, at the price of one more forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import LossFn, StepObjective
from fasttr.metrics.sums import NAMES, MicroBatches, pack_sums
from fasttr.training.run import Run

# What is summed over groups, not over rows: packs know nothing of the groups here.
OF_GROUPS = ("loss", "kl", "groups")


class CoupledStep(NamedTuple):
    """The loss of a step and its derivative by every log-prob, on every rank alike."""

    place: dict[int, int]  # of a row among the step's
    derivative_Bm: Tensor  # on the device
    sums: Tensor  # of the metrics, of which those OF_GROUPS are right

    def loss_fn(self, batch: PackedBatch) -> LossFn:
        """sum(derivative x log-prob) of one pack, as the head calls it."""
        cu_groups = batch.cu_groups.tolist()
        places = torch.tensor([self.place[row] for row in batch.rows])
        derivative_N = self.derivative_Bm[places.to(self.derivative_Bm.device)].flatten()

        def weighed(
            logp: Tensor,
            ref_logp: Tensor | None,
            groups: slice,
            head_means: Mapping[str, Tensor] | None = None,
            whole_logp: Tensor | None = None,
        ) -> Tensor:
            completions = slice(cu_groups[groups.start], cu_groups[groups.stop])
            return (derivative_N[completions] * logp).sum()

        return weighed

    def corrected(self, sums: Tensor, is_first: bool) -> Tensor:
        """The sums of this rank's packs, with what is of groups counted once for all ranks."""
        for name in OF_GROUPS:
            entry = NAMES.index(name)
            sums[:, entry] = self.sums[:, entry] if is_first else 0.0
        return sums


def coupled_step(
    run: Run,
    step: int,
    packs: Sequence[PackedBatch],
    objective: StepObjective,
    micro_batches: MicroBatches,
) -> CoupledStep:
    """The first sweep over this rank's packs, and the loss on what all ranks found."""
    rows = run.plan.rows(step)
    place = {int(row): i for i, row in enumerate(rows)}
    logp_Bm = np.full((len(rows), run.loss.completions), np.nan, dtype=np.float32)
    for batch in packs:
        found = run.policy.logps(batch).cpu().numpy()
        if not batch.rows:
            continue
        logp_Bm[[place[row] for row in batch.rows]] = found.reshape(len(batch.rows), -1)
    run.ranks.merge_(logp_Bm)
    whole = run.plan.one_pack(step)
    ref_logp = run.window_logps.get(whole.rows) if run.loss.needs_reference else None
    logp = torch.from_numpy(logp_Bm).flatten().requires_grad_()
    with torch.enable_grad():
        summed = objective.loss_fn(whole)(logp, ref_logp, slice(0, len(whole.cu_rows) - 1))
        loss = summed / objective.normalizer
        (derivative,) = torch.autograd.grad(loss, logp)
    found_of_step = _Scored(loss.detach(), logp.detach())
    sums = pack_sums(found_of_step, ref_logp, whole, run.loss, micro_batches)
    derivative_Bm = derivative.view(logp_Bm.shape).to(run.device)
    return CoupledStep(place, derivative_Bm, sums.to(run.device))


class _Scored(NamedTuple):
    """What the head would return of the whole step, without the statistics of tokens."""

    loss: Tensor
    logp: Tensor
    entropy: None = None
    correct: None = None
    logit_mean: None = None
