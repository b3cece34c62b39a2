"""Row functions in torch: what happens to a chunk of logits between the products. CPU tensors run
these.

A chunk of logits lives in one buffer. `score` leaves e = exp(z - max) there and `logit_grad` turns
it into dZ up to a factor per row, so that a chunk costs one exponential an element and no second
buffer.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import products

# Elements of a block of rows: it stays in a core's cache between the elementwise steps.
BLOCK_ELEMENTS = 1 << 17


class Head(NamedTuple):
    """z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap), in the compute dtype of the
    products."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        compute: torch.dtype,
    ) -> Head:
        bias = None if bias is None else bias.detach().to(products.wide(compute)).contiguous()
        return cls(
            weight.detach().to(compute),
            bias,
            float(logit_scale),
            None if softcap is None else float(softcap),
        )


class RowScores(NamedTuple):
    """Per row of a chunk, fp32 or fp64: p_v = exp(z_v - top) / total."""

    logp: Tensor
    top: Tensor
    total: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    mean: Tensor | None


class Workspace:
    """The buffers of a chunk, made once for a call."""

    def __init__(self, rows: int, head: Head, stats: bool, grads: bool):
        vocab, dtype = head.weight.shape[0], products.wide(head.weight.dtype)
        device = head.weight.device
        self.block = max(1, min(rows, BLOCK_ELEMENTS // vocab))
        self.logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        self.shifted = torch.empty(self.block if stats else 0, vocab, dtype=dtype, device=device)
        self.slope = torch.empty(
            rows if grads and head.softcap else 0, vocab, dtype=dtype, device=device
        )


def score(
    hidden_CD: Tensor, head: Head, target_C: Tensor, work: Workspace, stats: bool
) -> RowScores:
    """Log-prob of each row's target, and the statistics in the same sweep. A target outside 0..V-1
    gives NaN."""
    z_CV = work.logits[: hidden_CD.shape[0]]
    products.logits(hidden_CD, head.weight, z_CV, head.bias, head.logit_scale)
    rows, vocab = z_CV.shape
    known_C = (target_C >= 0) & (target_C < vocab)
    target_C1 = target_C.clamp(0, vocab - 1)[:, None]
    at_target_C, top_C, total_C = z_CV.new_empty(rows), z_CV.new_empty(rows), z_CV.new_empty(rows)
    weighted_C, mean_C = (z_CV.new_empty(rows), z_CV.new_empty(rows)) if stats else (None, None)
    correct_C = known_C.new_empty(rows) if stats else None
    for start in range(0, rows, work.block):
        here = slice(start, min(start + work.block, rows))
        z = _softcap(z_CV[here], head, work.slope[here])
        top = torch.amax(z, 1, keepdim=True)
        at_target = z.gather(1, target_C1[here])
        at_target_C[here], top_C[here] = at_target[:, 0], top[:, 0]
        if mean_C is not None and weighted_C is not None and correct_C is not None:
            torch.mean(z, 1, out=mean_C[here])
            correct_C[here] = _first_of_the_largest(z, at_target, top, target_C1[here])
            shifted = torch.sub(z, top, out=work.shifted[: z.shape[0]])
            torch.exp(shifted, out=z)
            weighted_C[here] = torch.linalg.vecdot(z, shifted)
        else:
            z.sub_(top).exp_()
        torch.sum(z, 1, out=total_C[here])
    log_total_C = total_C.log()
    logp_C = (at_target_C - top_C - log_total_C).masked_fill_(~known_C, float("nan"))
    if weighted_C is None or correct_C is None:
        return RowScores(logp_C, top_C, total_C, None, None, None)
    if weighted_C.isnan().any():  # 0 * -inf where a logit is -inf: the limit of e log e is 0
        bad = weighted_C.isnan()
        weighted_C[bad] = torch.xlogy(z_CV[bad], z_CV[bad]).sum(1)
    return RowScores(
        logp_C, top_C, total_C, log_total_C - weighted_C / total_C, correct_C & known_C, mean_C
    )


def _first_of_the_largest(z: Tensor, at_target: Tensor, top: Tensor, target: Tensor) -> Tensor:
    """Whether argmax, first index wins, is the target; argmax is slow, so it runs for rows that can
    be right."""
    right = (at_target == top)[:, 0]
    maybe = right.nonzero()[:, 0]
    if maybe.numel():
        right[maybe] = z[maybe].argmax(1) == target[maybe, 0]
    return right


def refill(hidden_CD: Tensor, head: Head, scores: RowScores, work: Workspace) -> None:
    """Put a chunk's e = exp(z - top) back for `logit_grad` after another chunk has used the
    buffer."""
    z_CV = work.logits[: hidden_CD.shape[0]]
    products.logits(hidden_CD, head.weight, z_CV, head.bias, head.logit_scale)
    for start in range(0, z_CV.shape[0], work.block):
        here = slice(start, min(start + work.block, z_CV.shape[0]))
        _softcap(z_CV[here], head, work.slope[here]).sub_(scores.top[here, None]).exp_()


def _softcap(z: Tensor, head: Head, slope: Tensor) -> Tensor:
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        if slope.shape[0]:
            torch.mul(z, z, out=slope).neg_().add_(1)
        z.mul_(head.softcap)
    return z


def logit_grad(
    scores: RowScores,
    head: Head,
    target_C: Tensor,
    on_target_C: Tensor,
    on_softmax_C: Tensor,
    work: Workspace,
) -> tuple[Tensor, Tensor | None]:
    """dZ = factor (on_target onehot - on_softmax p), with its factor per row, in place of the e
    that `score` left.

    Where both weights are one tensor the row factor takes them out of dZ, which then needs no sweep
    at all.
    """
    e_CV = work.logits[: target_C.shape[0]]
    target_C1 = target_C.clamp(0, e_CV.shape[1] - 1)[:, None]
    factor_C: Tensor | None
    if on_target_C is on_softmax_C:
        e_CV.scatter_add_(1, target_C1, -scores.total[:, None])
        factor_C = on_target_C * (-head.logit_scale) / scores.total
    else:
        e_CV.mul_((on_softmax_C * (-head.logit_scale) / scores.total)[:, None])
        e_CV.scatter_add_(1, target_C1, (on_target_C * head.logit_scale)[:, None])
        factor_C = None
    if head.softcap is not None:
        e_CV.mul_(work.slope[: e_CV.shape[0]])
    return e_CV, factor_C
