"""Attention one segment at a time: any device, any dtype, soft-capped scores.

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, Dh head width, w sliding window
in tokens, itself included, lq and lk queries and keys of one segment.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fasttr.batch import AttentionLayout


def attend_segments(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (S, Hkv, Dh)
    v: Tensor,  # (S, Hkv, Dh)
    layout: AttentionLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (T, H, Dh)
    # split, not slices: the backward of a slice writes a full-size zero tensor for every segment.
    queries = q.transpose(0, 1).split(layout.q_lengths, dim=1)
    keys = k.transpose(0, 1).split(layout.k_lengths, dim=1)
    values = v.transpose(0, 1).split(layout.k_lengths, dim=1)
    outputs = []
    for q_segment, k_segment, v_segment in zip(queries, keys, values, strict=True):
        if softcap is None:
            outputs.append(_attend(q_segment, k_segment, v_segment, scale, window))
        else:
            outputs.append(_attend_capped(q_segment, k_segment, v_segment, scale, window, softcap))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _attend(
    q: Tensor,  # (H, lq, Dh)
    k: Tensor,  # (Hkv, lk, Dh)
    v: Tensor,  # (Hkv, lk, Dh)
    scale: float,
    window: int | None,
) -> Tensor:
    mask = None
    lq, lk = q.shape[1], k.shape[1]
    if window is not None and lk > window:
        mask = visible(lq, lk, window, q.device)
    elif lq != lk:
        # `is_causal` would align the two at their beginnings.
        mask = causal_lower_right(lq, lk) if q.is_cuda else visible(lq, lk, None, q.device)
    out = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return out[0]


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    repeat = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(repeat, dim=0), v.repeat_interleave(repeat, dim=0)
    scores = torch.tanh(q @ k.transpose(1, 2) * (scale / softcap)) * softcap
    unseen = ~visible(q.shape[1], k.shape[1], window, q.device)
    scores = scores.masked_fill(unseen, float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v


def visible(lq: int, lk: int, window: int | None, device: torch.device) -> Tensor:
    """(lq, lk) bool: key j is seen by query i when j <= i + lk - lq and, with a window,
    j > i + lk - lq - window."""
    place_of_query = torch.arange(lk - lq, lk, device=device)[:, None]
    distance = place_of_query - torch.arange(lk, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
