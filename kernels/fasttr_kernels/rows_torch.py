"""Row functions in torch: what happens to a chunk of logits between the products. CPU tensors run
these.

A chunk of logits lives in one buffer. `row_logps` leaves e = exp(z - max) there and `logit_grad`
turns it into dZ up to a factor per row, so that a chunk costs one exponential an element and no
second buffer.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fasttr_kernels import products
from fasttr_kernels.head import Head, RowLogps

# Elements of a block of rows: it stays in a core's cache between the elementwise steps.
BLOCK_ELEMENTS = 1 << 17


class Workspace:
    """The buffers of a chunk, made once for a call of chunks with at most `rows` rows."""

    def __init__(self, rows: int, chunk_rows: int, head: Head, stats: bool, grads: bool):
        vocab = head.weight.shape[0]
        dtype = products.wide(head.weight.dtype)
        device = head.weight.device
        slope_rows = rows if grads and head.softcap else 0
        self.block = max(1, min(rows, BLOCK_ELEMENTS // vocab))
        self.logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        self.shifted = torch.empty(self.block if stats else 0, vocab, dtype=dtype, device=device)
        self.slope = torch.empty(slope_rows, vocab, dtype=dtype, device=device)


def row_logps(
    hidden_CD: Tensor, head: Head, target_C: Tensor, work: Workspace, out: RowLogps
) -> None:
    """Log-prob of each row's target, and the statistics that `out` holds, in the same sweep. A
    target outside 0..V-1 gives NaN."""
    z_CV = _products(hidden_CD, head, work)
    vocab = z_CV.shape[1]
    known_C = (target_C >= 0) & (target_C < vocab)
    target_C1 = target_C.clamp(0, vocab - 1)[:, None]
    for block in _blocks(z_CV.shape[0], work.block):
        z = _softcap(z_CV[block], head, work.slope[block])
        _exponentials(z, target_C1[block], out.part(block), work)
    _finish(out, z_CV, known_C)


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
    on_entropy_C: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dZ = factor (on_target onehot - p (on_softmax + on_entropy (z - top))), with its factor per
    row, in place of the e that `row_logps` left.

    Where the first two weights are one tensor the row factor takes them out of dZ, which then needs
    no sweep at all.
    """
    e_CV = work.logits[: target_C.shape[0]]
    target_C1 = target_C.clamp(0, e_CV.shape[1] - 1)[:, None]
    factor_C: Tensor | None = None
    if on_target_C is on_softmax_C and on_entropy_C is None:
        e_CV.scatter_add_(1, target_C1, -logps.total[:, None])
        factor_C = on_target_C * (-head.logit_scale) / logps.total
    else:
        scale_C1 = (-head.logit_scale / logps.total)[:, None]
        if on_entropy_C is None:
            e_CV.mul_(on_softmax_C[:, None] * scale_C1)
        else:
            _times_slope(e_CV, on_softmax_C[:, None], on_entropy_C[:, None], scale_C1, work)
        e_CV.scatter_add_(1, target_C1, (on_target_C * head.logit_scale)[:, None])
    if head.softcap is not None:
        e_CV.mul_(work.slope[: e_CV.shape[0]])
    return e_CV, factor_C


def _times_slope(
    e_CV: Tensor, at_0_C1: Tensor, slope_C1: Tensor, scale_C1: Tensor, work: Workspace
) -> None:
    """e <- scale e (at_0 + slope log e), where e log e is 0 at e = 0."""
    for block in _blocks(e_CV.shape[0], work.block):
        e = e_CV[block]
        e_log_e = torch.xlogy(e, e).mul_(slope_C1[block])
        e.mul_(at_0_C1[block]).add_(e_log_e).mul_(scale_C1[block])


def scale_(x: Tensor, by: Tensor) -> None:
    """x <- by x, not touched where `by` is 1."""
    if by != 1:
        x.mul_(by)


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


def _exponentials(z: Tensor, target_C1: Tensor, out: RowLogps, work: Workspace) -> None:
    """Turn a block of logits into e = exp(z - top), and keep the sums that `_finish` makes
    log-probs of: z_target in `logp`, sum e (z - top) in `entropy`, sum e^2 in `log_sum_squares`."""
    torch.amax(z, 1, out=out.top)
    top_C1 = out.top[:, None]
    at_target = z.gather(1, target_C1)
    out.logp.copy_(at_target[:, 0])
    if out.entropy is None or out.correct is None or out.mean is None:
        z.sub_(top_C1).exp_()
    else:
        torch.mean(z, 1, out=out.mean)
        out.correct.copy_(_first_of_the_largest(z, at_target, top_C1, target_C1))
        shifted = torch.sub(z, top_C1, out=work.shifted[: z.shape[0]])
        torch.exp(shifted, out=z)
        torch.linalg.vecdot(z, shifted, out=out.entropy)
    torch.sum(z, 1, out=out.total)
    if out.log_sum_squares is not None:
        torch.linalg.vecdot(z, z, out=out.log_sum_squares)


def _first_of_the_largest(z: Tensor, at_target: Tensor, top: Tensor, target: Tensor) -> Tensor:
    """Whether argmax, first index wins, is the target; argmax is slow, so it runs for rows that can
    be right."""
    right = (at_target == top)[:, 0]
    maybe = right.nonzero()[:, 0]
    if maybe.numel():
        right[maybe] = z[maybe].argmax(1) == target[maybe, 0]
    return right


def _finish(out: RowLogps, e_CV: Tensor, known_C: Tensor) -> None:
    """Log-probs and statistics of the sums that the sweep left in their places."""
    log_total_C = out.total.log()
    out.logp.sub_(out.top).sub_(log_total_C).masked_fill_(~known_C, float("nan"))
    if out.entropy is not None:
        # 0 * -inf where a logit is -inf: the limit of e log e is 0.
        bad = out.entropy.isnan()
        if bad.any():
            out.entropy[bad] = torch.xlogy(e_CV[bad], e_CV[bad]).sum(1)
        torch.sub(log_total_C, out.entropy.div_(out.total), out=out.entropy)
    if out.correct is not None:
        out.correct.logical_and_(known_C)
    if out.log_sum_squares is not None:
        out.log_sum_squares.log_().sub_(2 * log_total_C)
