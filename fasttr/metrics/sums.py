"""Sums of a step, kept on the device, and the means under TRL's names that they become.

Chosen and rejected are the two sides of a pair, or the desirable and undesirable rows of unpaired
data.

Legend: R predicting rows, N completions, m completions of a row.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import Loss

# Each entry of the vector of sums, and the one that it is divided by to give a mean; None: it is a
# count, or (the loss) a mean already.
SUMS: dict[str, str | None] = {
    "loss": None,
    "rows": None,
    "chosen_rows": None,
    "rejected_rows": None,
    "tokens": None,
    "chosen_tokens": None,
    "rejected_tokens": None,
    "groups": None,
    "chosen_logp": "chosen_rows",
    "rejected_logp": "rejected_rows",
    "chosen_reward": "chosen_rows",
    "rejected_reward": "rejected_rows",
    "wins": "rows",
    "distance": "rows",
    "chosen_logit": "chosen_tokens",
    "rejected_logit": "rejected_tokens",
    "entropy": "tokens",
    "correct": "chosen_tokens",
    "kl": "groups",
}
NAMES = tuple(SUMS)


class HeadOutput(Protocol):
    """What the head returns of a pack, as far as metrics read it."""

    @property
    def loss(self) -> Tensor: ...  # ()
    @property
    def logp(self) -> Tensor: ...  # (N,)
    @property
    def entropy(self) -> Tensor | None: ...  # (R,)
    @property
    def correct(self) -> Tensor | None: ...  # (R,) bool
    @property
    def logit_mean(self) -> Tensor | None: ...  # (R,)


def zeros(device: torch.device) -> Tensor:
    """The sums of nothing, (len(SUMS),) fp32."""
    return torch.zeros(len(SUMS), device=device)


@torch.no_grad()
def pack_sums(out: HeadOutput, ref_logp: Tensor | None, batch: PackedBatch, loss: Loss) -> Tensor:
    """The sums of one pack, (len(SUMS),) fp32 on the device."""
    sides = _sides(out.logp, batch, loss)
    rewards_N = _rewards(out.logp, ref_logp, batch)
    found = {"loss": out.loss.detach(), **_row_sums(out.logp, rewards_N, sides, batch, loss)}
    if loss.unpaired and loss.completions > 1 and ref_logp is not None:
        found.update(_kl_sums(rewards_N, batch, loss))
    if out.entropy is not None:
        found.update(_token_sums(out, sides, batch))
    zero = out.logp.new_zeros(())
    return torch.stack([found.get(name, zero).to(torch.float32) for name in NAMES])


class _Sides(NamedTuple):
    """1 where a completion counts as chosen, and as rejected; a mismatched one is neither."""

    chosen_N: Tensor
    rejected_N: Tensor


def _sides(logp_N: Tensor, batch: PackedBatch, loss: Loss) -> _Sides:
    m = loss.completions
    chosen_N, rejected_N = torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    if loss.unpaired:
        chosen_N[::m] = batch.labels.to(logp_N.dtype)
        rejected_N[::m] = 1 - chosen_N[::m]
    else:
        chosen_N[::m] = 1
        if m > 1:
            rejected_N[1::m] = 1
    return _Sides(chosen_N, rejected_N)


def _rewards(logp_N: Tensor, ref_logp: Tensor | None, batch: PackedBatch) -> Tensor:
    """(N,) what beta multiplies: log-ratios, or without a reference SimPO's and ORPO's means."""
    return logp_N / batch.token_counts if ref_logp is None else logp_N - ref_logp


def _row_sums(
    logp_N: Tensor, rewards_N: Tensor, sides: _Sides, batch: PackedBatch, loss: Loss
) -> dict[str, Tensor]:
    m = loss.completions
    of_a_row = 1 if loss.unpaired else m
    found = {
        "rows": logp_N.new_full((), len(batch.rows)),
        "chosen_rows": sides.chosen_N.sum(),
        "rejected_rows": sides.rejected_N.sum(),
        "chosen_logp": logp_N @ sides.chosen_N,
        "rejected_logp": logp_N @ sides.rejected_N,
        "chosen_reward": loss.beta * (rewards_N @ sides.chosen_N),
        "rejected_reward": loss.beta * (rewards_N @ sides.rejected_N),
        "distance": rewards_N.abs() @ (sides.chosen_N + sides.rejected_N) / of_a_row,
    }
    if m > 1 and not loss.unpaired:
        found["wins"] = (rewards_N[0::m] > rewards_N[1::m]).sum()
    return found


def _kl_sums(rewards_N: Tensor, batch: PackedBatch, loss: Loss) -> dict[str, Tensor]:
    """KTO's KL estimate of every group: the mean log-ratio of mismatched completions, from 0."""
    rows_of_groups = [last - first for first, last in itertools.pairwise(batch.cu_rows)]
    mismatched = rewards_N[1 :: loss.completions].split(rows_of_groups)
    estimates = torch.stack([group.mean().clamp(min=0) for group in mismatched])
    return {"kl": estimates.sum(), "groups": estimates.new_full((), len(rows_of_groups))}


def _token_sums(out: HeadOutput, sides: _Sides, batch: PackedBatch) -> dict[str, Tensor]:
    """What the head counted of each predicting row."""
    assert out.entropy is not None
    assert out.correct is not None
    assert out.logit_mean is not None
    lengths_N = batch.cu_completions.diff().to(out.logp.device, non_blocking=True)
    size = out.entropy.shape[0]
    chosen_R = sides.chosen_N.repeat_interleave(lengths_N, output_size=size)
    rejected_R = sides.rejected_N.repeat_interleave(lengths_N, output_size=size)
    either_R = chosen_R + rejected_R
    return {
        "tokens": either_R.sum(),
        "chosen_tokens": chosen_R.sum(),
        "rejected_tokens": rejected_R.sum(),
        "chosen_logit": out.logit_mean @ chosen_R,
        "rejected_logit": out.logit_mean @ rejected_R,
        "entropy": out.entropy @ either_R,
        "correct": out.correct.to(out.logp.dtype) @ chosen_R,
    }


def means(sums: Tensor) -> Tensor:
    """Sums of an optimizer step (or of an evaluation) to means, still on the device.

    NaN where there was nothing to average: a step without desirable rows has no mean of them.
    """
    place = {name: i for i, name in enumerate(NAMES)}
    values = []
    for name, count in SUMS.items():
        total = sums[place[name]]
        values.append(total if count is None else total / sums[place[count]])
    return torch.stack(values)


class Averages:
    """Means of steps, averaged over the steps that have them, until a line is written."""

    def __init__(self, device: torch.device, names: tuple[str, ...] = NAMES):
        self.names = names
        self.sums = torch.zeros(2, len(names), device=device)  # values; how many steps had one

    def add(self, step_means: Tensor) -> None:
        is_there = ~step_means.isnan()
        is_there[self.names.index("loss")] = True  # a loss that is not a number is never left out
        values = torch.where(is_there, step_means, 0.0)
        self.sums += torch.stack([values, is_there.to(self.sums.dtype)])

    def read(self) -> dict[str, float]:
        """By their names; waits for the device."""
        values = by_name(self.sums[0] / self.sums[1], self.names)
        self.sums.zero_()
        return values


def by_name(vector: Tensor, names: tuple[str, ...] = NAMES) -> dict[str, float]:
    """A vector in the order of its names as numbers; waits for the device."""
    return dict(zip(names, vector.tolist(), strict=True))


def as_metrics(means_of: dict[str, float], loss: Loss, prefix: str = "") -> dict[str, float]:
    """Means under TRL's metric names; what a loss or the rows do not have is left out."""
    out = {
        "loss": means_of["loss"],
        "logps/chosen": means_of["chosen_logp"],
        "logits/chosen": means_of["chosen_logit"],
        "entropy": means_of["entropy"],
    }
    has_both_sides = loss.completions > 1 or loss.unpaired
    if has_both_sides:
        chosen, rejected = means_of["chosen_reward"], means_of["rejected_reward"]
        out["logps/rejected"] = means_of["rejected_logp"]
        out["logits/rejected"] = means_of["rejected_logit"]
        out["rewards/chosen"] = chosen
        out["rewards/rejected"] = rejected
        out["rewards/margins"] = chosen - rejected
    if loss.needs_reference:
        out["ref/distance"] = means_of["distance"]
    if loss.unpaired:
        out["kl"] = means_of["kl"] if loss.completions > 1 else 0.0
    else:
        out["mean_token_accuracy"] = means_of["correct"]
        if has_both_sides:
            out["rewards/accuracies"] = means_of["wins"]
    return {
        prefix + name: value
        for name, value in out.items()
        if name == "loss" or not math.isnan(value)
    }


def binomial_stderr(share: float, n: int) -> float:
    """Standard error of a share of n independent rows."""
    return math.sqrt(share * (1 - share) / n)
