"""Attention one segment at a time: any device, any dtype, soft-capped scores, values of any width.

Where torch has a fused kernel for the CPU it is called, forward and backward; else the products are
written out, in blocks of queries that meet only the keys they may see.

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, g query heads of a key head, Dh
and Dv head widths, lq and lk queries and keys of one segment, b queries of a block, n keys that a
block meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr.models.backend import Offsets, Scores

BLOCK = 512  # queries; bounds the scores that exist at once


class Segments:
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        attend = _cpu_forward if has_cpu_kernel(q, v, scores) else _forward
        segments = _split(offsets, (q,), (k, v))
        found = [attend(q, k, v, scores) for q, k, v in segments]
        out, lse = zip(*found, strict=True)
        return _joined(out), torch.cat(lse, dim=1)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Offsets,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        differentiate = _cpu_backward if has_cpu_kernel(q, v, scores) else _backward
        lses = lse.split(offsets.lengths()[0], dim=1)
        segments = _split(offsets, (grad, q, out), (k, v))
        found = [
            differentiate(grad, q, out, k, v, lse, scores)
            for (grad, q, out, k, v), lse in zip(segments, lses, strict=True)
        ]
        dq, dk, dv = (_joined(x) for x in zip(*found, strict=True))
        return dq, dk, dv


def _split(
    offsets: Offsets, of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, ...]]:
    """Heads first, the rows of one segment after the other."""
    queries, keys = offsets.lengths()
    by_rows = [x.transpose(0, 1).split(queries, dim=1) for x in of_queries]
    by_keys = [x.transpose(0, 1).split(keys, dim=1) for x in of_keys]
    return zip(*by_rows, *by_keys, strict=True)


def _joined(segments: Sequence[Tensor]) -> Tensor:
    """Rows first again, contiguous."""
    return torch.cat([x.transpose(0, 1) for x in segments])


def has_cpu_kernel(q: Tensor, v: Tensor, scores: Scores) -> bool:
    return q.device.type == "cpu" and scores.softcap == 0 and q.shape[2] == v.shape[2]


def _cpu_forward(
    q: Tensor,  # (H, lq, Dh)
    k: Tensor,  # (Hkv, lk, Dh)
    v: Tensor,  # (Hkv, lk, Dh)
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    mask = _cpu_mask(q, k, scores)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], 0.0, mask is None, attn_mask=mask, scale=scores.scale
    )
    return out[0], lse[0]


def _cpu_backward(
    grad: Tensor,  # (H, lq, Dh)
    q: Tensor,
    out: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,  # (H, lq)
    scores: Scores,
) -> tuple[Tensor, ...]:
    mask = _cpu_mask(q, k, scores)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(x[None] for x in (grad, q, k, v, out, lse)),
        0.0,
        mask is None,
        attn_mask=mask,
        scale=scores.scale,
    )
    return tuple(x[0] for x in found)


def _cpu_mask(q: Tensor, k: Tensor, scores: Scores) -> Tensor | None:
    """None where the kernel's own causal order is the one wanted: it aligns queries and keys at
    their beginnings."""
    lq, lk = q.shape[1], k.shape[1]
    if lq == lk and not 0 < scores.window < lk:
        return None
    return _added_to_scores(lq, lk, scores.window, q.dtype)


@lru_cache(maxsize=32)  # every layer of a pack asks for the same ones
def _added_to_scores(lq: int, lk: int, window: int, dtype: torch.dtype) -> Tensor:
    """(lq, lk) of 0 and -inf."""
    seen = _visible(range(lk - lq, lk), range(lk), window, torch.device("cpu"))
    return torch.zeros(lq, lk, dtype=dtype).masked_fill_(~seen, float("-inf"))


class _Block(NamedTuple):
    """Some queries of a segment and all the keys that any of them sees."""

    queries: slice
    keys: slice
    unseen: Tensor  # (b, n) bool


def _blocks(lq: int, lk: int, window: int, device: torch.device) -> Iterator[_Block]:
    for first in range(0, lq, BLOCK):
        last = min(first + BLOCK, lq)
        places = range(lk - lq + first, lk - lq + last)
        begin = max(0, places.start - window + 1) if window else 0
        keys = range(begin, places.stop)
        unseen = ~_visible(places, keys, window, device)
        yield _Block(slice(first, last), slice(begin, places.stop), unseen)


def _forward(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    out, lse = [], []
    for block in _blocks(q.shape[1], k.shape[1], scores.window, q.device):
        s, _ = _scores(q[:, block.queries], k[:, block.keys], block, scores)
        of_rows = torch.logsumexp(s, dim=-1)
        p = torch.exp(s - of_rows[..., None])
        out.append(_by_heads(p, v[:, block.keys]))
        lse.append(of_rows)
    return torch.cat(out, dim=1), torch.cat(lse, dim=1)


def _backward(
    grad: Tensor, q: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, ...]:
    wide = lse.dtype
    along = (grad.to(wide) * out.to(wide)).sum(-1)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for block in _blocks(q.shape[1], k.shape[1], scores.window, q.device):
        rows, keys = block.queries, block.keys
        s, slope = _scores(q[:, rows], k[:, keys], block, scores)
        p = torch.exp(s - lse[:, rows, None])
        dp = _by_heads(grad[:, rows], v[:, keys].transpose(1, 2)).to(wide)
        ds = (p * (dp - along[:, rows, None]) * slope).to(q.dtype)
        dq[:, rows] = _by_heads(ds, k[:, keys])
        dk[:, keys] += _over_queries(ds, q[:, rows], len(k))
        dv[:, keys] += _over_queries(p, grad[:, rows], len(v))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _scores(
    q: Tensor,  # (H, b, Dh)
    k: Tensor,  # (Hkv, n, Dh)
    block: _Block,
    scores: Scores,
) -> tuple[Tensor, Tensor | float]:
    """(H, b, n) scores, fp32 or fp64, -inf where unseen; and their slope in q . k."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = _by_heads(q, k.transpose(1, 2)).to(wide) * scores.scale
    slope: Tensor | float = scores.scale
    if scores.softcap:
        t = torch.tanh(s / scores.softcap)
        s, slope = t * scores.softcap, scores.scale * (1 - t * t)
    return s.masked_fill(block.unseen, float("-inf")), slope


def _by_heads(
    x: Tensor,  # (H, b, a)
    of_keys: Tensor,  # (Hkv, a, c)
) -> Tensor:  # (H, b, c)
    """Products of every query head with its key head's matrix, in that matrix's dtype."""
    heads, b, _ = x.shape
    grouped = x.to(of_keys.dtype).reshape(len(of_keys), -1, x.shape[2])
    return torch.bmm(grouped, of_keys).view(heads, b, -1)


def _over_queries(
    x: Tensor,  # (H, b, n)
    y: Tensor,  # (H, b, c)
    key_heads: int,
) -> Tensor:  # (Hkv, n, c)
    """Sums over the queries of all query heads of a key head."""
    by_key_head = [z.reshape(key_heads, -1, z.shape[2]) for z in (x.to(y.dtype), y)]
    return torch.bmm(by_key_head[0].transpose(1, 2), by_key_head[1])


def _visible(places: range, keys: range, window: int, device: torch.device) -> Tensor:
    """(b, n) bool: a key is seen from its own place on, for `window` tokens."""
    query = torch.arange(places.start, places.stop, device=device)[:, None]
    distance = query - torch.arange(keys.start, keys.stop, device=device)
    seen = distance >= 0
    return seen & (distance < window) if window else seen
