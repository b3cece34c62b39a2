"""A loss with what it needs of an optimizer step, in the form that the fused head calls.

Legend: B rows, m completions of a row, n = m B completions, G groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch, TreeSource, own_prompt_lengths
from fasttr.losses.base import Loss, LossInputs

# (logp (n,), ref_logp (n,) or None, groups) -> (): the summed loss of a slice of whole groups.
LossFn = Callable[..., Tensor]


class AnyStepObjective(Protocol):
    """The objective of one optimizer step; a pack's share of it is summed loss / normalizer."""

    @property
    def normalizer(self) -> int: ...
    @property
    def head_means(self) -> Sequence[str]: ...

    def loss_fn(self, batch: PackedBatch) -> Any:
        """The loss of one pack, which is on the device, as its model calls it."""
        ...


class AnyObjective(Protocol):
    """What a run trains on: of log-probs, or of scores."""

    @property
    def loss(self) -> Any: ...

    def of_rows(self, trees: TreeSource, rows: np.ndarray) -> AnyStepObjective: ...


@dataclass(frozen=True)
class Objective:
    """A loss as a run trains on it."""

    loss: Loss
    average_over: int | None = None  # rows whose chosen tokens `sft` averages; None: the step's

    def of_rows(self, trees: TreeSource, rows: np.ndarray) -> StepObjective:
        """The loss of one optimizer step on `rows`: their sum divided by their number."""
        means = self._chosen_tokens_means(trees, rows) if self.loss.averages_tokens else None
        return StepObjective(self.loss, len(rows), means)

    def _chosen_tokens_means(self, trees: TreeSource, rows: np.ndarray) -> dict[int, float]:
        """By row: the mean number of predicted chosen tokens of the rows it is averaged with."""
        unpredicted = own_prompt_lengths(trees, rows)[:, 0] == 0
        predicted = trees.completion_lengths[rows, 0] - unpredicted
        size = self.average_over or len(rows)
        means: dict[int, float] = {}
        for first in range(0, len(rows), size):
            block = slice(first, first + size)
            mean = max(float(predicted[block].mean()), 1e-9)
            means.update(dict.fromkeys(rows[block].tolist(), mean))
        return means


class StepObjective(NamedTuple):
    """The objective of one optimizer step; a pack's share of it is summed loss / normalizer."""

    loss: Loss
    normalizer: int
    chosen_tokens_means: dict[int, float] | None  # by row, where the loss averages over tokens

    @property
    def head_means(self) -> Sequence[str]:
        """What the head hands to `loss_fn` beside log-probs (`loss_reads`)."""
        return self.loss.head_means

    def loss_fn(self, batch: PackedBatch) -> LossFn:
        """The loss of one pack, which is on the device, as the head calls it."""
        return group_loss(
            self.loss,
            batch.token_counts,
            batch.weights,
            cu_rows=batch.cu_rows,
            labels=batch.labels,
            chosen_tokens_mean=self._means_of(batch),
            per_completion=batch.per_completion,
        )

    def _means_of(self, batch: PackedBatch) -> Tensor | float:
        if self.chosen_tokens_means is None:
            return 1.0
        means = torch.tensor([self.chosen_tokens_means[row] for row in batch.rows])
        return means.to(batch.weights.device, non_blocking=True)


def group_loss(
    loss: Loss,
    token_counts: Tensor,  # (n,)
    weights: Tensor,  # (B,)
    *,
    cu_rows: Sequence[int] | None = None,  # (G+1,) row offsets; None: every row is a group
    labels: Tensor | None = None,  # (B,) bool
    chosen_tokens_mean: Tensor | float = 1.0,  # (B,)
    per_completion: Mapping[str, Tensor] | None = None,  # name -> (n,)
) -> LossFn:
    """`loss` in the form that `fasttr_kernels.linear_preference_loss` calls.

    (logp, ref_logp, groups) -> the weighted sum of the losses of those groups. A coupled loss sees
    one group at a time, any other all of them at once. `head_means` are those that the loss reads.
    Where a completion's log-prob was changed on the way (ld_alpha), `whole_logp` is what it was.
    """
    rows_of = _RowInputs(
        loss.completions, token_counts, labels, chosen_tokens_mean, per_completion or {}
    )

    def loss_fn(
        logp: Tensor,
        ref_logp: Tensor | None,
        groups: slice,
        head_means: Mapping[str, Tensor] | None = None,
        whole_logp: Tensor | None = None,
    ) -> Tensor:
        made = _Made(logp, ref_logp, head_means or {}, whole_logp)
        offsets = range(groups.stop + 1) if cu_rows is None else cu_rows
        first = offsets[groups.start]
        step = 1 if loss.coupled else groups.stop - groups.start
        sums = []
        for group in range(groups.start, groups.stop, step):
            rows = slice(offsets[group], offsets[group + step])
            inputs = rows_of.inputs(rows, first, made)
            sums.append((weights[rows] * loss(inputs)).sum())
        return torch.stack(sums).sum()

    return loss_fn


class _Made(NamedTuple):
    """What the head has made of some completions."""

    logp: Tensor
    ref_logp: Tensor | None
    means: Mapping[str, Tensor]
    whole_logp: Tensor | None


class _RowInputs(NamedTuple):
    """What is known of the rows of a pack before their log-probs are."""

    completions: int
    token_counts: Tensor
    labels: Tensor | None
    chosen_tokens_mean: Tensor | float
    per_completion: Mapping[str, Tensor]

    def inputs(self, rows: slice, first: int, made: _Made) -> LossInputs:
        """Those of `rows`; what the head made begins at row `first` of the pack."""
        m = self.completions
        of_pack = slice(rows.start * m, rows.stop * m)
        of_made = slice((rows.start - first) * m, (rows.stop - first) * m)
        mean = self.chosen_tokens_mean
        return LossInputs(
            logp=made.logp[of_made],
            ref_logp=None if made.ref_logp is None else made.ref_logp[of_made],
            token_counts=self.token_counts[of_pack],
            completions=m,
            labels=None if self.labels is None else self.labels[rows],
            chosen_tokens_mean=mean[rows] if isinstance(mean, Tensor) else mean,
            whole_logp=None if made.whole_logp is None else made.whole_logp[of_made],
            per_completion={
                **{name: x[of_pack] for name, x in self.per_completion.items()},
                **{name: x[of_made] for name, x in made.means.items()},
            },
        )
