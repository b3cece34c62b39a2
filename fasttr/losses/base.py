"""What a loss reads, and how a loss over rows becomes the function that the fused head calls.

Legend: n completions, B rows, m completions a row, G groups of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Scored(NamedTuple):
    """Rows with the scores of their m completions, row after row.

    A pair is (chosen, rejected); an unpaired row has its own completion first, then, for `kto`, a
    mismatched one.
    """

    logp: Tensor  # (n,) policy, summed over completion tokens, nats
    ref_logp: Tensor | None  # (n,) reference; None for a loss without one
    tokens: Tensor  # (n,) completion token counts
    per_row: int = 2  # m
    labels: Tensor | None = None  # (B,) bool, of unpaired rows: desirable or not
    chosen_tokens_mean: Tensor | float = (
        1.0  # (B,) mean of chosen tokens where sft averages; read by `Sft` alone
    )

    @property
    def chosen(self) -> Tensor:  # (B,) c
        return self.logp[:: self.per_row]

    @property
    def rejected(self) -> Tensor:  # (B,) r
        return self.logp[1 :: self.per_row]

    @property
    def ref_margin(self) -> Tensor:  # (B,) c0 - r0
        ref = self._reference
        return ref[:: self.per_row] - ref[1 :: self.per_row]

    @property
    def logratio(self) -> Tensor:  # (n,)
        return self.logp - self._reference

    @property
    def _reference(self) -> Tensor:
        if self.ref_logp is None:
            raise ValueError(
                "got no ref_logp; wanted the reference's log-probs, since this loss compares with "
                "it"
            )
        return self.ref_logp

    @property
    def u(self) -> Tensor:  # (B,) c - c0
        return self.logratio[:: self.per_row]

    @property
    def v(self) -> Tensor:  # (B,) r - r0; of an unpaired row the mismatched completion's
        return self.logratio[1 :: self.per_row]

    @property
    def n_c(self) -> Tensor:  # (B,)
        return self.tokens[:: self.per_row]

    @property
    def n_r(self) -> Tensor:  # (B,)
        return self.tokens[1 :: self.per_row]


@dataclass(frozen=True)
class Loss:
    """One number per row. Subclasses are frozen dataclasses with the equation in their
    docstring."""

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    completions: ClassVar[int] = 2  # how many completions of a row it reads
    unpaired: ClassVar[bool] = False  # rows have a label instead of a rejected side
    coupled: ClassVar[bool] = False  # a row's loss depends on the other rows of its group

    def __call__(self, scored: Scored) -> Tensor:
        raise TypeError(f"{type(self).__name__} is a base of losses; wanted one of them")


class Weighted(NamedTuple):
    """Several losses on the same pairs: the sum of weight x loss (a list in `loss_type`, with
    `loss_weights`)."""

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]

    @property
    def beta(self) -> float:
        return self.losses[0].beta

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses)

    @property
    def completions(self) -> int:
        return max(loss.completions for loss in self.losses)

    @property
    def unpaired(self) -> bool:
        return False

    @property
    def coupled(self) -> bool:
        return any(loss.coupled for loss in self.losses)

    def __call__(self, scored: Scored) -> Tensor:
        total = self.weights[0] * self.losses[0](scored)
        for weight, loss in zip(self.weights[1:], self.losses[1:], strict=True):
            total = total + weight * loss(scored)
        return total


def group_loss(
    loss: Loss | Weighted,
    tokens: Tensor,  # (n,)
    weights: Tensor,  # (B,)
    *,
    cu_rows: list[int]
    | None = None,  # (G+1,) row offsets of the groups; None: every row is a group
    labels: Tensor | None = None,  # (B,) bool
    chosen_tokens_mean: Tensor | float = 1.0,  # (B,)
) -> Callable[[Tensor, Tensor | None, slice], Tensor]:
    """`loss` in the form that `fasttr_kernels.linear_preference_loss` calls: (logp, ref_logp,
    groups) -> the weighted sum of the losses of those groups. A coupled loss sees one group at a
    time, any other all of them at once."""
    m = loss.completions

    def rows_loss(logp: Tensor, ref_logp: Tensor | None, rows: slice) -> Tensor:
        mean = (
            chosen_tokens_mean[rows]
            if isinstance(chosen_tokens_mean, Tensor)
            else chosen_tokens_mean
        )
        scored = Scored(
            logp,
            ref_logp,
            tokens[rows.start * m : rows.stop * m],
            m,
            None if labels is None else labels[rows],
            mean,
        )
        return (weights[rows] * loss(scored)).sum()

    def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        cu = cu_rows if cu_rows is not None else range(groups.stop + 1)
        first = cu[groups.start]
        if not loss.coupled:
            return rows_loss(logp, ref_logp, slice(first, cu[groups.stop]))
        parts = []
        for g in range(groups.start, groups.stop):
            here = slice((cu[g] - first) * m, (cu[g + 1] - first) * m)
            ref = None if ref_logp is None else ref_logp[here]
            parts.append(rows_loss(logp[here], ref, slice(cu[g], cu[g + 1])))
        return torch.stack(parts).sum()

    return loss_fn
