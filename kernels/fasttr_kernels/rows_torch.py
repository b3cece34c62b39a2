"""Row functions in torch: what happens to a chunk of logits between the products. CPU tensors run
these.

A chunk of logits lives in one buffer. `row_logps` leaves e = exp(z - max) there and `logit_grad`
turns it into dZ up to a factor per row, so that a chunk costs one exponential an element and no
second buffer.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import products
from fasttr_kernels.head import Head, RowLogps

# Elements of a block of rows: it stays in a core's cache between the elementwise steps.
BLOCK_ELEMENTS = 1 << 17


class Workspace:
    """The buffers of a chunk, made once for a call."""

    def __init__(self, rows: int, head: Head, stats: bool, grads: bool):
        vocab = head.weight.shape[0]
        dtype = products.wide(head.weight.dtype)
        device = head.weight.device
        slope_rows = rows if grads and head.softcap else 0
        self.block = max(1, min(rows, BLOCK_ELEMENTS // vocab))
        self.logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        self.shifted = torch.empty(self.block if stats else 0, vocab, dtype=dtype, device=device)
        self.slope = torch.empty(slope_rows, vocab, dtype=dtype, device=device)


class _Sums(NamedTuple):
    """What the sweep over the blocks of a chunk collects for each row."""

    at_target: Tensor
    top: Tensor
    total: Tensor  # sum of e
    weighted: Tensor | None  # sum of e (z - top)
    correct: Tensor | None
    mean: Tensor | None

    @classmethod
    def empty(cls, z_CV: Tensor, stats: bool) -> _Sums:
        rows = z_CV.shape[0]
        return cls(
            at_target=z_CV.new_empty(rows),
            top=z_CV.new_empty(rows),
            total=z_CV.new_empty(rows),
            weighted=z_CV.new_empty(rows) if stats else None,
            correct=z_CV.new_empty(rows, dtype=torch.bool) if stats else None,
            mean=z_CV.new_empty(rows) if stats else None,
        )


def row_logps(
    hidden_CD: Tensor, head: Head, target_C: Tensor, work: Workspace, stats: bool
) -> RowLogps:
    """Log-prob of each row's target, and the statistics in the same sweep. A target outside 0..V-1
    gives NaN."""
    z_CV = _products(hidden_CD, head, work)
    vocab = z_CV.shape[1]
    known_C = (target_C >= 0) & (target_C < vocab)
    target_C1 = target_C.clamp(0, vocab - 1)[:, None]
    sums = _Sums.empty(z_CV, stats)
    for block in _blocks(z_CV.shape[0], work.block):
        z = _softcap(z_CV[block], head, work.slope[block])
        _exponentials(z, target_C1[block], sums, block, work)
    return _finished(sums, z_CV, known_C)


def refill(hidden_CD: Tensor, head: Head, logps: RowLogps, work: Workspace) -> None:
    """Put a chunk's e = exp(z - top) back for `logit_grad` after another chunk has used the
    buffer."""
    z_CV = _products(hidden_CD, head, work)
    for block in _blocks(z_CV.shape[0], work.block):
        _softcap(z_CV[block], head, work.slope[block]).sub_(logps.top[block, None]).exp_()


def logit_grad(
    logps: RowLogps,
    head: Head,
    target_C: Tensor,
    on_target_C: Tensor,
    on_softmax_C: Tensor,
    work: Workspace,
) -> tuple[Tensor, Tensor | None]:
    """dZ = factor (on_target onehot - on_softmax p), with its factor per row, in place of the e
    that `row_logps` left.

    Where both weights are one tensor the row factor takes them out of dZ, which then needs no sweep
    at all.
    """
    e_CV = work.logits[: target_C.shape[0]]
    target_C1 = target_C.clamp(0, e_CV.shape[1] - 1)[:, None]
    factor_C: Tensor | None = None
    if on_target_C is on_softmax_C:
        e_CV.scatter_add_(1, target_C1, -logps.total[:, None])
        factor_C = on_target_C * (-head.logit_scale) / logps.total
    else:
        e_CV.mul_((on_softmax_C * (-head.logit_scale) / logps.total)[:, None])
        e_CV.scatter_add_(1, target_C1, (on_target_C * head.logit_scale)[:, None])
    if head.softcap is not None:
        e_CV.mul_(work.slope[: e_CV.shape[0]])
    return e_CV, factor_C


def _products(hidden_CD: Tensor, head: Head, work: Workspace) -> Tensor:
    z_CV = work.logits[: hidden_CD.shape[0]]
    products.logits(hidden_CD, head.weight, z_CV, head.bias, head.logit_scale)
    return z_CV


def _blocks(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _softcap(z: Tensor, head: Head, slope: Tensor) -> Tensor:
    """Soft-cap logits in place, and keep the slope of the cap where a gradient will ask for it."""
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        if slope.shape[0]:
            torch.mul(z, z, out=slope).neg_().add_(1)
        z.mul_(head.softcap)
    return z


def _exponentials(z: Tensor, target_C1: Tensor, sums: _Sums, block: slice, work: Workspace) -> None:
    """Turn a block of logits into e = exp(z - top), and keep its sums."""
    top = torch.amax(z, 1, keepdim=True)
    at_target = z.gather(1, target_C1)
    sums.at_target[block] = at_target[:, 0]
    sums.top[block] = top[:, 0]
    if sums.mean is None or sums.weighted is None or sums.correct is None:
        z.sub_(top).exp_()
    else:
        torch.mean(z, 1, out=sums.mean[block])
        sums.correct[block] = _first_of_the_largest(z, at_target, top, target_C1)
        shifted = torch.sub(z, top, out=work.shifted[: z.shape[0]])
        torch.exp(shifted, out=z)
        sums.weighted[block] = torch.linalg.vecdot(z, shifted)
    torch.sum(z, 1, out=sums.total[block])


def _first_of_the_largest(z: Tensor, at_target: Tensor, top: Tensor, target: Tensor) -> Tensor:
    """Whether argmax, first index wins, is the target; argmax is slow, so it runs for rows that can
    be right."""
    right = (at_target == top)[:, 0]
    maybe = right.nonzero()[:, 0]
    if maybe.numel():
        right[maybe] = z[maybe].argmax(1) == target[maybe, 0]
    return right


def _finished(sums: _Sums, e_CV: Tensor, known_C: Tensor) -> RowLogps:
    log_total_C = sums.total.log()
    logp_C = (sums.at_target - sums.top - log_total_C).masked_fill_(~known_C, float("nan"))
    entropy_C = correct_C = None
    if sums.weighted is not None:
        # 0 * -inf where a logit is -inf: the limit of e log e is 0.
        bad = sums.weighted.isnan()
        if bad.any():
            sums.weighted[bad] = torch.xlogy(e_CV[bad], e_CV[bad]).sum(1)
        entropy_C = log_total_C - sums.weighted / sums.total
    if sums.correct is not None:
        correct_C = sums.correct & known_C
    return RowLogps(logp_C, sums.top, sums.total, entropy_C, correct_C, sums.mean)
