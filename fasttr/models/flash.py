"""FlashAttention on a GPU: the copy inside torch, and the package flash-attn.

Neither has run where this was written: arguments are checked against the signatures of torch, and
of flash-attn's interface in version 2.8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.models.backend import Offsets, Scores


class TorchFlash:
    """No build is needed. It has no soft cap, and wants heads of a multiple of 8, at most 256."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *_contiguous(q, k, _widened(v, q)),
            offsets.cu_q,
            offsets.cu_k,
            *offsets.longest(),
            0.0,
            True,
            False,
            scale=scores.scale,
            window_size_left=_left(scores),
            window_size_right=0,
        )
        return _narrowed(out, v), lse

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
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            _widened(grad, q).contiguous(),
            *_contiguous(q, k, _widened(v, q), _widened(out, q)),
            lse,
            offsets.cu_q,
            offsets.cu_k,
            *offsets.longest(),
            0.0,
            True,
            no_dropout,
            torch.empty(0, device=q.device),
            scale=scores.scale,
            window_size_left=_left(scores),
            window_size_right=0,
        )
        return dq, dk, _narrowed(dv, v)


class PackageFlash:
    """flash-attn 2.8: soft-capped scores too."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: Offsets, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        out, lse, *_ = _flash_attn_varlen_forward(
            *_contiguous(q, k, _widened(v, q)), **_package_arguments(offsets, scores)
        )
        return _narrowed(out, v), lse

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
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

        q, k, wide_v, wide_out = _contiguous(q, k, _widened(v, q), _widened(out, q))
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(wide_v)
        _flash_attn_varlen_backward(
            _widened(grad, q).contiguous(),
            q,
            k,
            wide_v,
            wide_out,
            lse,
            dq,
            dk,
            dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_package_arguments(offsets, scores),
        )
        return dq, dk, _narrowed(dv, v)


def _package_arguments(offsets: Offsets, scores: Scores) -> dict[str, object]:
    longest_q, longest_k = offsets.longest()
    return {
        "cu_seqlens_q": offsets.cu_q,
        "cu_seqlens_k": offsets.cu_k,
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_k,
        "dropout_p": 0.0,
        "softmax_scale": scores.scale,
        "causal": True,
        "window_size_left": _left(scores),
        "window_size_right": 0,
        "softcap": scores.softcap,
        "alibi_slopes": None,
    }


def _left(scores: Scores) -> int:
    """Tokens to the left of a query, as FlashAttention counts: without itself."""
    return scores.window - 1 if scores.window else -1


def _widened(v: Tensor, q: Tensor) -> Tensor:
    """Values with zeros up to the width of queries and keys (latent attention has them apart)."""
    missing = q.shape[2] - v.shape[2]
    return F.pad(v, (0, missing)) if missing else v


def _narrowed(x: Tensor, v: Tensor) -> Tensor:
    return x[..., : v.shape[2]].contiguous()


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """FlashAttention takes any stride but in the last dimension."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
