"""From padded batches to the rows that the ops take.

Legend: B sequences of S positions, T scored rows, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import checks


class Rows(NamedTuple):
    """Scored rows, sequence by sequence."""

    hidden: Tensor  # (T, D)
    target: Tensor  # (T,)
    lengths: list[int]  # (B,) rows of each sequence


def from_padded(
    hidden: Tensor,  # (B, S, D)
    labels: Tensor,  # (B, S)
    ignore_index: int = -100,
    order: Tensor | None = None,  # (B,)
) -> Rows:
    """The rows of a padded batch whose label is not `ignore_index`, for `linear_preference_loss`:
    prompts and padding cost nothing there.

    A label is the id that its position predicts. transformers' `labels` are the ids at each
    position: pass `hidden[:, :-1]` and `labels[:, 1:]`. Losses of pairs want chosen and rejected in
    turn: `order` says which sequence comes when, and `halves(B)` is that of a batch that holds all
    chosen, then all rejected sequences (TRL, Liger, torchtune). Differentiable in `hidden`. Waits
    for the device once, to count.

    Raises:
        ValueError: shapes that do not fit, labels that are not ids.
    """
    if hidden.dim() != 3:
        raise checks.fail(
            "hidden", f"shape {tuple(hidden.shape)}", "(B, S, D)", "pass the padded batch"
        )
    if labels.shape != hidden.shape[:2]:
        raise checks.fail(
            "labels",
            f"shape {tuple(labels.shape)}",
            f"{tuple(hidden.shape[:2])}",
            "one label for each position",
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise checks.fail("labels", labels.dtype, "int64 or int32", "convert with .long()")
    if order is None:
        order = torch.arange(labels.shape[0])
    order = order.to(labels.device)
    S = labels.shape[1]
    scored = (labels != ignore_index).index_select(0, order)
    lengths = scored.sum(1).tolist()
    # Places in the batch as it came, so that nothing larger than the rows is copied.
    place = (order[:, None] * S + torch.arange(S, device=labels.device))[scored]
    return Rows(
        hidden=hidden.flatten(0, 1).index_select(0, place),
        target=labels.flatten()[place],
        lengths=lengths,
    )


def halves(completions: int, parts: int = 2) -> Tensor:
    """(B,) the order that makes pairs of a batch of first halves, then second halves; with `parts`
    of other groups than pairs."""
    if completions % parts:
        raise checks.fail(
            "completions", completions, f"a multiple of {parts}", "leave no group incomplete"
        )
    return torch.arange(completions).view(parts, -1).t().flatten()
