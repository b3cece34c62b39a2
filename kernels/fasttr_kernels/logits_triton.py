"""Triton kernels for a chunk of logits: the two sweeps over it, and the scaling of what came of it.

`logp_kernel` reads each logit once for the log-sum-exp, the target's log-prob and the statistics;
`logit_grad_kernel` reads it once and writes dZ in the dtype of the products. One program owns one
row (the first) or a block of one row (the second); nothing is added atomically, so results repeat
bit for bit.

Legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The first is the one that ships; FASTTR_AUTOTUNE=1 measures them all.
LOGP_CONFIGS = [
    triton.Config({"BLOCK_V": block, "LANES": 32 * warps}, num_warps=warps)
    for block, warps in ((2048, 4), (1024, 4), (4096, 8), (4096, 4))
]
GRAD_CONFIGS = [
    triton.Config({"BLOCK_V": block}, num_warps=warps)
    for block, warps in ((4096, 8), (2048, 4), (8192, 8), (2048, 8))
]
# Vectors over rows start wherever a piece starts: compiled for an aligned start as well, every
# piece that begins elsewhere would wait for a compilation of its own.
VECTORS = (
    "Target",
    "Logp",
    "Top",
    "Total",
    "Entropy",
    "Correct",
    "Mean",
    "LogSumSquares",
    "OnTarget",
    "OnSoftmax",
    "OnEntropy",
)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Consecutive logits of a lane: one load of 16 bytes in fp32.
WIDE = tl.constexpr(4)


def _search(configs: list) -> list:
    return configs if os.environ.get("FASTTR_AUTOTUNE") == "1" else configs[:1]


@triton.jit
def _tanh(x):
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if x.dtype == tl.float64:
        return far
    # Near 0 the difference from 1 loses digits: there x + x^3 P(x^2), of relative error 1.1e-9,
    # fitted to |x| < 0.55.
    g = x * x
    p = tl.fma(g, -0.00627423909, 0.0210716787)
    p = tl.fma(g, p, -0.0538523098)
    p = tl.fma(g, p, 0.133325861)
    p = tl.fma(g, p, -0.333333176)
    return tl.where(tl.abs(x) < 0.55, tl.fma(x, g * p, x), far)


@triton.jit
def _logit(raw, bias, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    z = raw
    if bias is not None:
        z += bias.to(z.dtype)
    if SCALE != 1.0:
        z *= SCALE
    if SOFTCAP is not None:
        z = SOFTCAP * _tanh(z * (1.0 / SOFTCAP))
    return z


@triton.jit
def _lane_max(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _absorb(
    z,  # (BLOCK_V / LANES / WIDE, LANES, WIDE)
    mask,  # as z, or None
    top,  # (LANES,), as all that follow
    total,
    weighted,
    plain,
    squares,
    STATS: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """The running sums of each lane with one more block of logits in them."""
    new_top = tl.maximum(top, _lane_max(z))
    drop = top - new_top
    keep = tl.exp2(drop * LOG2E)
    shifted = z - new_top[None, :, None]
    e = tl.exp2(shifted * LOG2E)
    if STATS:
        # Far below the maximum e is 0, and a finite factor keeps 0 * -inf out.
        weighted = keep * (weighted + drop * total) + _lane_sum(e * tl.maximum(shifted, -1e4))
        plain += _lane_sum(z if mask is None else tl.where(mask, z, 0.0))
    if SQUARES:
        squares = keep * keep * squares + _lane_sum(e * e)
    total = keep * total + _lane_sum(e)
    return new_top, total, weighted, plain, squares


@triton.jit
def _at_target(z, offs_v, target, top):
    """From the block that holds the target, by lane: its logit (0 elsewhere), and the largest logit
    before it."""
    before = tl.where(offs_v < target, z, LOWEST)
    return _lane_sum(tl.where(offs_v == target, z, 0.0)), tl.maximum(top, _lane_max(before))


@triton.autotune(configs=_search(LOGP_CONFIGS), key=["V"])
@triton.heuristics({"HAS_BIAS": lambda a: a["Bias"] is not None})
@triton.jit(do_not_specialize_on_alignment=VECTORS)
def logp_kernel(
    Z,  # (C, V) rows of pitch stride_z
    Bias,  # (V,) or None
    Target,  # (C,)
    Logp,  # (C,)
    Top,  # (C,)
    Total,  # (C,)
    Entropy,  # (C,) written with STATS
    Correct,  # (C,) written with STATS
    Mean,  # (C,) written with STATS
    LogSumSquares,  # (C,) written with SQUARES
    V,
    stride_z,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATS: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Each lane, a thread of the program, keeps sums under a maximum of its own, so that no thread
    waits for another before the end of the row."""
    pid_c = tl.program_id(0)
    row = Z + pid_c.to(tl.int64) * stride_z
    dtype = Z.dtype.element_ty
    known = (tl.load(Target + pid_c) >= 0) & (tl.load(Target + pid_c) < V)
    target = tl.where(known, tl.load(Target + pid_c), -1).to(tl.int32)
    # A finite start for the maxima: -inf - -inf is NaN.
    top = tl.full((LANES,), LOWEST, dtype)
    total = tl.zeros((LANES,), dtype)
    weighted = tl.zeros((LANES,), dtype)
    plain = tl.zeros((LANES,), dtype)
    squares = tl.zeros((LANES,), dtype)
    at_target = tl.zeros((LANES,), dtype)
    before_target = top
    run = tl.arange(0, BLOCK_V // LANES // WIDE)[:, None, None] * (LANES * WIDE)
    lane = tl.arange(0, LANES)[None, :, None] * WIDE
    offs = run + lane + tl.arange(0, WIDE)[None, None, :]
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        offs_v = start + offs
        bias = tl.load(Bias + offs_v) if HAS_BIAS else None
        z = _logit(tl.load(row + offs_v), bias, SCALE, SOFTCAP)
        if (start <= target) & (target < start + BLOCK_V):
            at_target, before_target = _at_target(z, offs_v, target, top)
        top, total, weighted, plain, squares = _absorb(
            z, None, top, total, weighted, plain, squares, STATS, SQUARES
        )
    if whole < V:
        offs_v = whole + offs
        mask_v = offs_v < V
        bias = tl.load(Bias + offs_v, mask=mask_v, other=0.0) if HAS_BIAS else None
        # Masked by the pitch, a multiple of 16 elements, so that the load stays wide where V is
        # odd.
        raw = tl.load(row + offs_v, mask=offs_v < stride_z, other=0.0)
        z = tl.where(mask_v, _logit(raw, bias, SCALE, SOFTCAP), float("-inf"))
        if whole <= target:
            at_target, before_target = _at_target(z, offs_v, target, top)
        top, total, weighted, plain, squares = _absorb(
            z, mask_v, top, total, weighted, plain, squares, STATS, SQUARES
        )
    row_top = tl.max(top, 0)
    drop = top - row_top
    keep = tl.exp2(drop * LOG2E)
    row_total = tl.sum(keep * total, 0)
    row_at_target = tl.sum(at_target, 0)
    logp = row_at_target - row_top - tl.log(row_total)
    tl.store(Logp + pid_c, tl.where(known, logp, float("nan")))
    tl.store(Top + pid_c, row_top)
    tl.store(Total + pid_c, row_total)
    if STATS:
        row_weighted = tl.sum(keep * (weighted + drop * total), 0)
        tl.store(Entropy + pid_c, tl.log(row_total) - row_weighted / row_total)
        tl.store(Mean + pid_c, tl.sum(plain, 0) / V)
        # The first of the largest: no logit is larger, and none before it is equal.
        first = (row_at_target == row_top) & (tl.max(before_target, 0) < row_top)
        tl.store(Correct + pid_c, known & first)
    if SQUARES:
        row_squares = tl.sum(keep * keep * squares, 0)
        tl.store(LogSumSquares + pid_c, tl.log(row_squares) - 2.0 * tl.log(row_total))


@triton.autotune(configs=_search(GRAD_CONFIGS), key=["V"], restore_value=["Z"])
@triton.heuristics(
    {
        "HAS_BIAS": lambda a: a["Bias"] is not None,
        "HAS_ENTROPY": lambda a: a["OnEntropy"] is not None,
    }
)
@triton.jit(do_not_specialize_on_alignment=VECTORS)
def logit_grad_kernel(
    Z,  # (C, V) rows of pitch stride_z
    Bias,  # (V,) or None
    Target,  # (C,)
    Top,  # (C,)
    Total,  # (C,)
    OnTarget,  # (C,)
    OnSoftmax,  # (C,)
    OnEntropy,  # (C,) or None
    DZ,  # (C, V) rows of pitch stride_dz; may be Z
    V,
    stride_z,
    stride_dz,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_c = tl.program_id(0)
    pid_v = tl.program_id(1)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    raw = tl.load(Z + pid_c.to(tl.int64) * stride_z + offs_v, mask=offs_v < stride_z, other=0.0)
    bias = tl.load(Bias + offs_v, mask=mask_v, other=0.0) if HAS_BIAS else None
    z = _logit(raw, bias, SCALE, SOFTCAP)
    shifted = z - tl.load(Top + pid_c)
    total = tl.load(Total + pid_c)
    on_softmax = tl.load(OnSoftmax + pid_c) / total
    if HAS_ENTROPY:
        # Far below the maximum p is 0, and a finite factor keeps 0 * -inf out.
        on_softmax += tl.load(OnEntropy + pid_c) / total * tl.maximum(shifted, -1e4)
    dz = tl.where(offs_v == tl.load(Target + pid_c), tl.load(OnTarget + pid_c), 0.0)
    dz -= on_softmax * tl.exp2(shifted * LOG2E)
    if SOFTCAP is not None:
        y = z * (1.0 / SOFTCAP)
        dz *= 1.0 - y * y
    if SCALE != 1.0:
        dz *= SCALE
    # The padding is written too (zeros), which keeps the store wide where V is odd.
    dz = tl.where(mask_v, dz, 0.0)
    tl.store(
        DZ + pid_c.to(tl.int64) * stride_dz + offs_v,
        dz.to(DZ.dtype.element_ty),
        mask=offs_v < stride_dz,
    )


@triton.jit
def scale_kernel(X, By, n, BLOCK: tl.constexpr):
    by = tl.load(By)
    if by == 1.0:
        return
    step = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(X + offs, mask=offs < n)
        tl.store(X + offs, (x.to(by.dtype) * by).to(x.dtype), mask=offs < n)
