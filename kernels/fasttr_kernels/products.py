"""The three matrix products of a head, with fp32 (or fp64) results whatever the inputs.

A low-precision product with fp32 output exists on CUDA alone; elsewhere the weight is upcast in
vocabulary tiles, since logits rounded to bf16 put a tenth of a nat of noise on the log-prob of 300
tokens.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_V = 4096


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and accumulators: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for v in range(0, weight_VD.shape[0], TILE_V):
        tile = slice(v, v + TILE_V)
        yield tile, weight_VD[tile].to(dtype)


def logits(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    out_CV: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """out = scale (hidden weight^T + bias), in the dtype of `out`."""
    if hidden_CD.dtype == out_CV.dtype:
        if bias_V is not None:
            torch.addmm(
                bias_V.to(out_CV.dtype),
                hidden_CD,
                weight_VD.t(),
                beta=scale,
                alpha=scale,
                out=out_CV,
            )
        else:
            torch.mm(hidden_CD, weight_VD.t(), out=out_CV)
            if scale != 1.0:
                out_CV.mul_(scale)
    elif hidden_CD.is_cuda:
        torch.mm(hidden_CD, weight_VD.t(), out_dtype=out_CV.dtype, out=out_CV)
        if bias_V is not None:
            out_CV.add_(bias_V)
        if scale != 1.0:
            out_CV.mul_(scale)
    else:
        rows_CD = hidden_CD.to(out_CV.dtype)
        for tile, weight_tile in _tiles(weight_VD, out_CV.dtype):
            logits(
                rows_CD,
                weight_tile,
                out_CV[:, tile],
                None if bias_V is None else bias_V[tile],
                scale,
            )


def hidden_grad(dz_CV: Tensor, weight_VD: Tensor, out_CD: Tensor) -> None:
    """out = dz weight, summed in fp32 or wider and rounded once: a product with a bf16 result may
    add its partial sums in bf16."""
    accumulator = wide(dz_CV.dtype)
    if dz_CV.dtype != weight_VD.dtype:
        wide_CD = torch.zeros(out_CD.shape, dtype=dz_CV.dtype, device=dz_CV.device)
        for tile, weight_tile in _tiles(weight_VD, dz_CV.dtype):
            wide_CD.addmm_(dz_CV[:, tile], weight_tile)
        out_CD.copy_(wide_CD)
    elif dz_CV.dtype == accumulator and out_CD.dtype == accumulator:
        torch.mm(dz_CV, weight_VD, out=out_CD)
    elif dz_CV.dtype == accumulator:
        out_CD.copy_(torch.mm(dz_CV, weight_VD))
    elif out_CD.dtype == accumulator:
        torch.mm(dz_CV, weight_VD, out_dtype=accumulator, out=out_CD)
    else:
        out_CD.copy_(torch.mm(dz_CV, weight_VD, out_dtype=accumulator))


def weight_grad(dz_CV: Tensor, hidden_CD: Tensor, out_VD: Tensor, beta: float) -> None:
    """out = beta out + dz^T hidden; `out` is fp32 or wider. With beta 0 what it held, NaN too, is
    ignored."""
    if dz_CV.dtype == out_VD.dtype:
        out_VD.addmm_(dz_CV.t(), hidden_CD.to(dz_CV.dtype), beta=beta)
    else:
        torch.addmm(out_VD, dz_CV.t(), hidden_CD, beta=beta, out_dtype=out_VD.dtype, out=out_VD)
