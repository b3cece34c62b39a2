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
    "router_loss": "rows",
    "margin": None,  # no sum: `means` makes it of the two rewards
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


class MicroBatches(NamedTuple):
    """Which micro-batch of a step each row of a pack belongs to."""

    of_row_B: Tensor  # int64, on the device
    number: int  # of micro-batches in the step


def zeros(device: torch.device, micro_batches: int = 1) -> Tensor:
    """The sums of nothing, (micro_batches, len(SUMS)) fp32."""
    return torch.zeros(micro_batches, len(SUMS), device=device)


@torch.no_grad()
def pack_sums(
    out: HeadOutput,
    ref_logp: Tensor | None,
    batch: PackedBatch,
    loss: Loss,
    micro_batches: MicroBatches | None = None,
    router_loss: Tensor | None = None,  # ()
) -> Tensor:
    """The sums of one pack, (micro_batches, len(SUMS)) fp32 on the device; by default all its rows
    are of one micro-batch. The loss is summed over all of them and stands in the first."""
    if micro_batches is None:
        micro_batches = MicroBatches(torch.zeros_like(batch.labels, dtype=torch.int64), 1)
    sides = _sides(out.logp, batch, loss)
    rewards_N = _rewards(out.logp, ref_logp, batch)
    found = _row_sums(out.logp, rewards_N, sides, loss, micro_batches)
    if loss.unpaired and loss.completions > 1 and ref_logp is not None:
        found |= _kl_sums(rewards_N, batch, loss, micro_batches)
    if out.entropy is not None:
        found |= _token_sums(out, sides, batch, loss, micro_batches)
    if router_loss is not None:
        found["router_loss"] = router_loss * found["rows"]
    found["loss"] = torch.zeros_like(found["rows"])
    found["loss"][0] = out.loss.detach()
    nothing = torch.zeros_like(found["rows"])
    return torch.stack([found.get(name, nothing).to(torch.float32) for name in NAMES], dim=1)


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


def _summed(values: dict[str, Tensor], place: Tensor, number: int) -> dict[str, Tensor]:
    """Vectors summed by `place`, each (number,): in a fixed order, and in fp32 whatever TF32 is."""
    stacked = torch.stack(list(values.values()))
    if number == 1:
        return dict(zip(values, stacked.sum(dim=1, keepdim=True), strict=True))
    is_there = place == torch.arange(number, device=place.device)[:, None]
    sums = torch.stack([(stacked * chosen).sum(dim=1) for chosen in is_there], dim=1)
    return dict(zip(values, sums, strict=True))


def _row_sums(
    logp_N: Tensor,
    rewards_N: Tensor,
    sides: _Sides,
    loss: Loss,
    micro_batches: MicroBatches,
) -> dict[str, Tensor]:
    m = loss.completions
    chosen_N, rejected_N = sides
    of_a_row = 1 if loss.unpaired else m
    values_N = {
        "chosen_rows": chosen_N,
        "rejected_rows": rejected_N,
        "chosen_logp": logp_N * chosen_N,
        "rejected_logp": logp_N * rejected_N,
        "chosen_reward": loss.beta * rewards_N * chosen_N,
        "rejected_reward": loss.beta * rewards_N * rejected_N,
        "distance": rewards_N.abs() * (chosen_N + rejected_N) / of_a_row,
    }
    values_B = {name: value.view(-1, m).sum(dim=1) for name, value in values_N.items()}
    values_B["rows"] = torch.ones_like(values_B["distance"])
    if m > 1 and not loss.unpaired:
        values_B["wins"] = (rewards_N[0::m] > rewards_N[1::m]).to(logp_N.dtype)
    return _summed(values_B, micro_batches.of_row_B, micro_batches.number)


def _kl_sums(
    rewards_N: Tensor, batch: PackedBatch, loss: Loss, micro_batches: MicroBatches
) -> dict[str, Tensor]:
    """KTO's KL estimate of every group: the mean log-ratio of mismatched completions, from 0."""
    rows_of_groups = [last - first for first, last in itertools.pairwise(batch.cu_rows)]
    mismatched = rewards_N[1 :: loss.completions].split(rows_of_groups)
    estimates_G = torch.stack([group.mean().clamp(min=0) for group in mismatched])
    values_G = {"kl": estimates_G, "groups": torch.ones_like(estimates_G)}
    first_rows = list(batch.cu_rows[:-1])
    return _summed(values_G, micro_batches.of_row_B[first_rows], micro_batches.number)


def _token_sums(
    out: HeadOutput,
    sides: _Sides,
    batch: PackedBatch,
    loss: Loss,
    micro_batches: MicroBatches,
) -> dict[str, Tensor]:
    """What the head counted of each predicting row."""
    assert out.entropy is not None
    assert out.correct is not None
    assert out.logit_mean is not None
    lengths_N = batch.cu_completions.diff().to(out.logp.device, non_blocking=True)
    size = out.entropy.shape[0]
    chosen_R = sides.chosen_N.repeat_interleave(lengths_N, output_size=size)
    rejected_R = sides.rejected_N.repeat_interleave(lengths_N, output_size=size)
    either_R = chosen_R + rejected_R
    values_R = {
        "tokens": either_R,
        "chosen_tokens": chosen_R,
        "rejected_tokens": rejected_R,
        "chosen_logit": out.logit_mean * chosen_R,
        "rejected_logit": out.logit_mean * rejected_R,
        "entropy": out.entropy * either_R,
        "correct": out.correct.to(out.logp.dtype) * chosen_R,
    }
    place_N = micro_batches.of_row_B.repeat_interleave(loss.completions)
    place_R = place_N.repeat_interleave(lengths_N, output_size=size)
    return _summed(values_R, place_R, micro_batches.number)


def means(sums: Tensor) -> Tensor:
    """Sums of micro-batches (or of an evaluation) to means, still on the device, of their shape.

    NaN where there was nothing to average: one without desirable rows has no mean of them, and no
    margin. The loss is a mean already and stands in the first.
    """
    place = {name: i for i, name in enumerate(NAMES)}
    values = []
    for name, count in SUMS.items():
        total = sums[:, place[name]]
        values.append(total if count is None else total / sums[:, place[count]])
    found = torch.stack(values, dim=1)
    chosen, rejected = (found[:, place[f"{side}_reward"]] for side in ("chosen", "rejected"))
    found[:, place["margin"]] = chosen - rejected
    found[1:, place["loss"]] = torch.nan
    return found


def over_micro_batches(micro_means: Tensor) -> Tensor:
    """The mean over those that have one; of the loss, which stands first, what the first holds."""
    mean = micro_means.nanmean(dim=0)
    mean[0] = micro_means[0, 0]
    return mean


class Averages:
    """Means of micro-batches, averaged over those that have one, until a line is written."""

    def __init__(self, device: torch.device, names: tuple[str, ...] = NAMES):
        self.names = names  # the first is the loss
        self.sums = torch.zeros(2, len(names), device=device)  # values; how many of them

    def add(self, micro_means: Tensor) -> None:
        """(micro-batches, len(names)) of one step."""
        is_there = ~micro_means.isnan()
        is_there[0, 0] = True  # a loss that is not a number is never left out
        values = torch.where(is_there, micro_means, 0.0)
        self.sums += torch.stack([values.sum(dim=0), is_there.sum(dim=0).to(self.sums.dtype)])

    def read(self) -> dict[str, float]:
        """By their names; waits for the device."""
        values = by_name(self.sums[0] / self.sums[1], self.names)
        self.sums.zero_()
        return values


def by_name(vector: Tensor, names: tuple[str, ...] = NAMES) -> dict[str, float]:
    """A vector in the order of its names as numbers; waits for the device."""
    return dict(zip(names, vector.tolist(), strict=True))


def as_metrics(means_of: dict[str, float], loss: Loss) -> dict[str, float]:
    """Means under TRL's metric names; what a loss or the rows do not have is left out."""
    out = {
        "loss": means_of["loss"],
        "logps/chosen": means_of["chosen_logp"],
        "logits/chosen": means_of["chosen_logit"],
        "entropy": means_of["entropy"],
    }
    has_both_sides = loss.completions > 1 or loss.unpaired
    if has_both_sides:
        out["logps/rejected"] = means_of["rejected_logp"]
        out["logits/rejected"] = means_of["rejected_logit"]
        out["rewards/chosen"] = means_of["chosen_reward"]
        out["rewards/rejected"] = means_of["rejected_reward"]
        out["rewards/margins"] = means_of["margin"]
    if loss.needs_reference:
        out["ref/distance"] = means_of["distance"]
    if means_of["router_loss"]:
        out["aux_loss"] = means_of["router_loss"]
    if loss.unpaired:
        out["kl"] = means_of["kl"] if loss.completions > 1 else 0.0
    else:
        out["mean_token_accuracy"] = means_of["correct"]
        if has_both_sides:
            out["rewards/accuracies"] = means_of["wins"]
    return {name: value for name, value in out.items() if name == "loss" or not math.isnan(value)}


def binomial_stderr(share: float, n: int) -> float:
    """Standard error of a share of n independent rows."""
    return math.sqrt(share * (1 - share) / n)
