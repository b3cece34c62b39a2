"""Per-token log-probs of a linear head without its logits.

Legend: T rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import checks, products
from fasttr_kernels import rows as torch_rows
from fasttr_kernels.preference import accumulate, default_chunk_rows
from fasttr_kernels.rows import Head


class Logprob(NamedTuple):
    """What `linear_logprob` returns. Nats."""

    logp: Tensor  # (T,)
    lse: Tensor  # (T,)
    entropy: Tensor | None  # (T,) no gradient
    correct: Tensor | None  # (T,) bool: the target is the argmax


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int,
                logit_scale: float, softcap: float | None, stats: bool, compute: torch.dtype) -> Any:  # fmt: skip
        head = Head(weight.to(compute), None if bias is None else bias.to(products.wide(compute)), logit_scale, softcap)
        rows_TD, ignored_T = hidden.to(compute), target == ignore_index
        step = default_chunk_rows(weight.shape[0], hidden.device)
        work = torch_rows.Workspace(min(step, max(1, len(target))), head, stats, False)
        parts = []
        for start in range(0, len(target), step):
            piece = slice(start, start + step)
            seen = target[piece].masked_fill(ignored_T[piece], 0)
            parts.append(torch_rows.score(rows_TD[piece], head, seen, work, stats))
        dtype = products.wide(compute)
        empty = hidden.new_empty(0, dtype=dtype)
        logp, top, total = (torch.cat([empty, *x]) for x in list(zip(*parts, strict=True))[:3] or [()] * 3)
        logp = logp.masked_fill(ignored_T, 0.0)
        lse = top + total.log()
        entropy = torch.cat([empty, *(p.entropy for p in parts if p.entropy is not None)]) if stats else None
        correct = (
            torch.cat([ignored_T[:0], *(p.correct for p in parts if p.correct is not None)]) & ~ignored_T
            if stats
            else None
        )
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.args = (ignore_index, logit_scale, softcap, compute, step)
        ctx.mark_non_differentiable(*(x for x in (entropy, correct) if x is not None))
        return logp, lse, entropy, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logp: Tensor, d_lse: Tensor, *_: Any) -> Any:
        hidden, weight, bias, target = ctx.saved_tensors
        ignore_index, logit_scale, softcap, compute, step = ctx.args
        head = Head(weight.to(compute), None if bias is None else bias.to(products.wide(compute)), logit_scale, softcap)
        rows_TD, ignored_T = hidden.to(compute), target == ignore_index
        dtype = products.wide(compute)
        want = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if want[0] else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if want[1] else None
        d_bias = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device) if want[2] else None
        d_logp = d_logp.to(dtype).masked_fill(ignored_T, 0.0)
        on_softmax = d_logp - d_lse.to(dtype)
        work = torch_rows.Workspace(min(step, max(1, len(target))), head, False, True)
        for start in range(0, len(target), step):
            piece = slice(start, start + step)
            seen = target[piece].masked_fill(ignored_T[piece], 0)
            scores = torch_rows.score(rows_TD[piece], head, seen, work, False)
            dz, factor = torch_rows.logit_grad(scores, head, seen, d_logp[piece], on_softmax[piece], work)
            accumulate(dz, factor, rows_TD[piece], head.weight, None if d_hidden is None else d_hidden[piece],
                       d_weight, d_bias, True)  # fmt: skip
        return (d_hidden, None if d_weight is None else d_weight.to(weight.dtype),
                None if d_bias is None or bias is None else d_bias.to(bias.dtype),
                None, None, None, None, None, None)  # fmt: skip


def linear_logprob(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: bool = False,
) -> Logprob:
    """Per-token log-prob and log-sum-exp of a linear head, differentiable in hidden, weight, bias."""
    compute = checks.head(hidden, weight, target, bias)
    checks.head_options(logit_scale, softcap)
    with torch.autocast(hidden.device.type, enabled=False):
        return Logprob(*_Logprob.apply(hidden, weight, bias, target.long(), ignore_index, float(logit_scale), softcap,
                                       stats, compute))  # fmt: skip
