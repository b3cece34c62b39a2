"""Attention over packed trees as one op on tensors, `fasttr::attend`, which a compiled layer takes
whole.

Keys and values of a shared prompt are gathered inside the op and gathered again in its backward, so
that only the pack's own rows are kept. Sinks (a logit a head that takes part in the softmax and
carries no value) rescale what a back end without them returns: with p_sink in the log-sum-exp, the
same backward is exact.

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, Dh and Dv head widths.
"""

from __future__ import annotations

from typing import Any

import torch
from fasttr_kernels.gather import gather_keys, sum_over_readers
from torch import Tensor

from fasttr.batch import AttentionLayout
from fasttr.models.backend import Backend, Offsets, Scores
from fasttr.models.flash import PackageFlash, TorchFlash
from fasttr.models.segments import Segments

_BACKENDS: dict[str, Backend] = {
    "segments": Segments(),
    "varlen": TorchFlash(),
    "flash": PackageFlash(),
}


def attend(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (T, Hkv, Dh)
    v: Tensor,  # (T, Hkv, Dv)
    layout: AttentionLayout,
    scores: Scores,
    backend: str,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (T, H, Dv)
    """Every query against the keys that `layout` gives its segment."""
    out, _ = _attend(
        q,
        k,
        v,
        sinks,
        layout.cu_q,
        layout.cu_k,
        layout.on_host,
        *layout.keys,
        *scores,
        backend,
    )
    return out


@torch.library.custom_op("fasttr::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor,
    on_host: Tensor,
    sources: Tensor,
    reader_offsets: Tensor,
    readers: Tensor,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(T, H, Dv), and the log-sum-exp of the scores (H, T), fp32 or fp64, sinks included."""
    k, v = _gathered(k, v, sources)
    offsets, scores = Offsets(cu_q, cu_k, on_host), Scores(scale, window, softcap)
    out, lse = _BACKENDS[backend].forward(q, k, v, offsets, scores)
    if sinks is not None:
        with_sinks = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
        out = out * torch.exp(lse - with_sinks).t()[..., None].to(out.dtype)
        lse = with_sinks
    # FlashAttention's results lie in memory as its inputs do, heads first behind partial rotary
    # embeddings; a compiled layer reads them as the fake kernels below promise.
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("fasttr::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    on_host: Tensor,
    sources: Tensor,
    reader_offsets: Tensor,
    readers: Tensor,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, where there are any, of the sinks."""
    rows = len(k)
    k, v = _gathered(k, v, sources)
    offsets, scores = Offsets(cu_q, cu_k, on_host), Scores(scale, window, softcap)
    dq, dk, dv = _BACKENDS[backend].backward(grad, q, k, v, out, lse, offsets, scores)
    if len(sources) != rows:
        dk, dv = sum_over_readers(dk, dv, reader_offsets, readers)
    dq, dk, dv = (x.contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, _sink_gradient(grad, out, lse, sinks)


def _gathered(k: Tensor, v: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """As many gathered rows as rows means that no prompt is shared: the identity."""
    return (k, v) if len(sources) == len(k) else gather_keys(k, v, sources)


def _sink_gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """d/ds of out = sum_j p_j v_j, the sink without a value: -p_s (grad . out), over the rows."""
    if sinks is None:
        return grad.new_empty(0)
    share = torch.exp(sinks[:, None].to(lse.dtype) - lse)
    along = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
    return -(share * along).sum(1).to(sinks.dtype)


@_attend.register_fake
def _(q, k, v, sinks, *layout_and_scores):
    rows, heads = q.shape[:2]
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(rows, heads, v.shape[2]), q.new_empty(heads, rows, dtype=wide)


@_attend_backward.register_fake
def _(grad, q, k, v, sinks, *others):
    of_sinks = grad.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return *(x.new_empty(x.shape) for x in (q, k, v)), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, *layout = inputs[:10]
    ctx.save_for_backward(q, k, v, sinks, *output, *layout)
    ctx.scores_and_backend = inputs[10:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    """The log-sum-exp is not for others: its gradient does not exist."""
    saved = ctx.saved_tensors
    *of_inputs, of_sinks = _attend_backward(grad, *saved, *ctx.scores_and_backend)
    has_sinks = saved[3] is not None
    return (*of_inputs, of_sinks if has_sinks else None, *[None] * 10)


_attend.register_autograd(_differentiate, setup_context=_keep)
