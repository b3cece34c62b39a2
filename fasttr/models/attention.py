"""Attention over packed trees, plugged into transformers through its AttentionInterface.

The layout comes with every call as the keyword `fasttr_layout`; nothing is inferred from position
ids. Back ends: `varlen` (torch.nn.attention.varlen, CUDA, half precision), `flash` (flash-attn,
CUDA) and `segments` (scaled dot
product attention, one segment at a time: any device, any dtype, soft-capped scores).

Legend: T packed rows, S gathered key rows, H heads, Dh head width, w sliding window in tokens,
itself included.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fasttr.batch import AttentionLayout, RowGather
from fasttr.errors import FasttrError

BACKENDS = ("varlen", "flash", "segments")


class _GatherRows(torch.autograd.Function):
    """x[index] along dimension 0 whose backward sums readers in a fixed order: `index_select` adds
    atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, gather: RowGather) -> Tensor:
        ctx.gather, ctx.rows = gather, x.shape[0]
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_x = grad.new_zeros(ctx.rows, *grad.shape[1:])
        for level, (source, output) in enumerate(ctx.gather.levels):
            # Sources are unique within a level: one writer each.
            if level == 0:
                grad_x.index_copy_(0, source, grad.index_select(0, output))
            else:
                grad_x.index_copy_(
                    0, source, grad_x.index_select(0, source) + grad.index_select(0, output)
                )
        return grad_x, None, None


def gather_rows(x: Tensor, gather: RowGather) -> Tensor:
    """Rows `gather.sources` of x (T, ...) with a deterministic backward; x itself when the gather
    is the identity."""
    return x if gather.sources is None else _GatherRows.apply(x, gather.sources, gather)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, Dh)
    key: Tensor,  # (1, Hkv, T, Dh)
    value: Tensor,  # (1, Hkv, T, Dh)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fasttr_layout: AttentionLayout | None = None,
    fasttr_backend: str = "segments",
    **other: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for every attention layer; returns ((1, T, H, Dh), None)."""
    if fasttr_layout is None:
        raise FasttrError(
            "attention: got no packed layout; wanted `fasttr_layout` in the call of the base model"
        )
    if attention_mask is not None:
        raise FasttrError(
            "attention: got a mask; wanted none, since the layout says what each row sees"
        )
    if dropout > 0:
        raise FasttrError(
            f"attention: got dropout {dropout}; wanted 0: policy and reference are scored without "
            "it"
        )
    if other.get("s_aux") is not None:
        raise FasttrError(
            "attention: got attention sinks (s_aux), which are not built; use a model without them"
        )
    if not getattr(module, "is_causal", True):
        raise FasttrError(
            "attention: got a layer that is not causal; wanted a causal language model"
        )
    if sliding_window is None:
        _refuse_lost_window(module, max(fasttr_layout.k_lengths))
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings and norms with fp32 weights promote q and k; v comes in the compute
        # dtype.
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    q = query[0].transpose(0, 1)
    k = gather_rows(key[0].transpose(0, 1), fasttr_layout.keys)
    v = gather_rows(value[0].transpose(0, 1), fasttr_layout.keys)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _choose(fasttr_backend, q, softcap)
    return attend(q, k, v, fasttr_layout, scale, sliding_window, softcap)[None], None


def _choose(backend: str, q: Tensor, softcap: float | None) -> Callable[..., Tensor]:
    """What each back end cannot do falls to the segments, which are exact for everything: fp32 and
    soft caps."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if backend == "flash" and half:
        return _flash
    if backend == "varlen" and half and softcap is None:
        return _varlen
    return _segments


def _refuse_lost_window(module: torch.nn.Module, longest: int) -> None:
    """Some architectures keep their window in the mask alone, which a packed layout never sees."""
    config: Any = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if not window or longest <= window:
        return
    kinds = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if kinds is None or (layer is not None and kinds[layer] == "sliding_attention"):
        raise FasttrError(
            f"attention: layer {layer} of {config.model_type} is configured for a window of "
            f"{window} but passes none, "
            f"and a sequence has {longest} tokens; lower max_length to {window} or use another "
            "architecture"
        )


def _varlen(
    q, k, v, layout: AttentionLayout, scale: float, window: int | None, softcap: None
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _varlen_takes_grouped_heads():
            grouped = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    left = -1 if window is None else window - 1
    return varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_q,
        layout.cu_k,
        max(layout.q_lengths),
        max(layout.k_lengths),
        scale=scale,
        window_size=(left, 0),
        **grouped,
    )


@lru_cache(maxsize=1)
def _varlen_takes_grouped_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash(
    q, k, v, layout: AttentionLayout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    left = -1 if window is None else window - 1
    return flash_attn_varlen_func(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_q,
        layout.cu_k,
        max(layout.q_lengths),
        max(layout.k_lengths),
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
        softcap=softcap or 0.0,
    )


def _segments(
    q, k, v, layout: AttentionLayout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    # split, not slices: the backward of a slice writes a full-size zero tensor for every segment.
    qs = q.transpose(0, 1).split(layout.q_lengths, dim=1)
    ks = k.transpose(0, 1).split(layout.k_lengths, dim=1)
    vs = v.transpose(0, 1).split(layout.k_lengths, dim=1)
    if softcap is None:
        outs = [_sdpa_segment(*one, scale, window) for one in zip(qs, ks, vs, strict=True)]
    else:
        outs = [
            _softcap_segment(*one, scale, window, softcap) for one in zip(qs, ks, vs, strict=True)
        ]
    return torch.cat(outs, dim=1).transpose(0, 1)


def _sdpa_segment(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    lq, lk = q.shape[1], k.shape[1]
    grouped = q.shape[0] != k.shape[0]
    q, k, v = q[None], k[None], v[None]
    if window is not None and lk > window:
        mask = _visible(lq, lk, window, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped
        )[0]
    if lq == lk:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )[0]
    if q.is_cuda:
        mask = causal_lower_right(lq, lk)
    else:
        mask = _visible(lq, lk, None, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)[
        0
    ]


def _softcap_segment(q, k, v, scale: float, window: int | None, softcap: float) -> Tensor:
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, dim=0), v.repeat_interleave(repeat, dim=0)
    scores = torch.tanh(q @ k.transpose(1, 2) * (scale / softcap)) * softcap
    scores = scores.masked_fill(~_visible(q.shape[1], k.shape[1], window, q.device), float("-inf"))
    return (
        torch.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        @ v
    )


def _visible(lq: int, lk: int, window: int | None, device: torch.device) -> Tensor:
    """(lq, lk) bool: key j is seen by query i when j <= i + lk - lq and, with a window, j > i + lk
    - lq - window."""
    distance = torch.arange(lk - lq, lk, device=device)[:, None] - torch.arange(lk, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def register() -> str:
    """Make `fasttr_packed` known to transformers and return the name.

    No mask function is registered: transformers then builds no mask at all, and does not read
    position ids back to the host in search of packed sequences.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("fasttr_packed", packed_attention)
    return "fasttr_packed"
