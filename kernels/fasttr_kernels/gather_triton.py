"""The gather of keys and values, and the ordered sum of its gradients, in Triton.

One program is one row of keys and of values together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INDICES = ("Sources", "Offsets", "Readers")  # arguments that are int32


@triton.jit
def _copy_row(
    X, Out, source, row, width, stride_t, stride_h, HEAD: tl.constexpr, BLOCK: tl.constexpr
):
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        place = source * stride_t + (column // HEAD) * stride_h + column % HEAD
        tl.store(Out + row * width + column, tl.load(X + place, mask=inside), mask=inside)


@triton.jit
def gather_kernel(
    K,
    V,
    Sources,  # (S,) int32
    OutK,
    OutV,
    width_k,  # H Dk
    width_v,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    HEAD_K: tl.constexpr,
    HEAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(Sources + row).to(tl.int64)
    _copy_row(K, OutK, source, row, width_k, stride_kt, stride_kh, HEAD_K, BLOCK)
    _copy_row(V, OutV, source, row, width_v, stride_vt, stride_vh, HEAD_V, BLOCK)


@triton.jit
def _sum_row(Grad, Out, Readers, begin, end, row, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.zeros((BLOCK,), WIDE)
        for i in range(begin, end):
            reader = tl.load(Readers + i).to(tl.int64)
            total += tl.load(Grad + reader * width + column, mask=inside).to(WIDE)
        tl.store(Out + row * width + column, total.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    GradK,  # (S, H Dk), contiguous
    GradV,  # (S, H Dv), contiguous
    Offsets,  # (T + 1,) int32
    Readers,  # (S,) int32
    OutK,
    OutV,
    width_k,
    width_v,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(Offsets + row), tl.load(Offsets + row + 1)
    _sum_row(GradK, OutK, Readers, begin, end, row, width_k, WIDE, BLOCK)
    _sum_row(GradV, OutV, Readers, begin, end, row, width_v, WIDE, BLOCK)


def gather(k: Tensor, v: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    rows = len(sources)
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    out_k, out_v = k.new_empty(rows, *k.shape[1:]), v.new_empty(rows, *v.shape[1:])
    width_k, width_v = _width(k), _width(v)
    gather_kernel[(rows,)](
        k,
        v,
        sources,
        out_k,
        out_v,
        width_k,
        width_v,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HEAD_K=k.shape[2],
        HEAD_V=v.shape[2],
        **launch_options(max(width_k, width_v)),
    )
    return out_k, out_v


def sum_over_readers(
    dk: Tensor, dv: Tensor, offsets: Tensor, readers: Tensor
) -> tuple[Tensor, Tensor]:
    dk, dv = dk.contiguous(), dv.contiguous()
    source_rows = len(offsets) - 1
    out_k = dk.new_empty(source_rows, *dk.shape[1:])
    out_v = dv.new_empty(source_rows, *dv.shape[1:])
    width_k, width_v = _width(dk), _width(dv)
    sum_kernel[(source_rows,)](
        dk,
        dv,
        offsets,
        readers,
        out_k,
        out_v,
        width_k,
        width_v,
        WIDE=tl.float64 if dk.dtype == torch.float64 else tl.float32,
        **launch_options(max(width_k, width_v)),
    )
    return out_k, out_v


def _width(x: Tensor) -> int:
    return x.shape[1] * x.shape[2]


def launch_options(width: int) -> dict[str, int]:
    """Eight elements a thread and step: 16 bytes of bf16."""
    block = min(max(triton.next_power_of_2(width), 128), 2048)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}
