"""Row functions in Triton: the two sweeps over a chunk of logits on a GPU.

`row_logps` reads each logit once for the log-sum-exp, the target's log-prob and the statistics;
`logit_grad` reads it once and writes dZ in the dtype of the products. One program owns one row
(`row_logps`) or a block of one row (`logit_grad`); nothing is added atomically, so results
repeat bit for bit.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttr_kernels import products
from fasttr_kernels.head import Head, RowLogps

# Rows of the buffers start on 256 bytes and are padded to whole 16-byte words, so loads are wide at
# any vocabulary.
PITCH = 64
# The first is the one that ships; FASTTR_AUTOTUNE=1 measures them all.
LOGP_CONFIGS = [
    triton.Config({"BLOCK_V": b}, num_warps=w)
    for b, w in ((2048, 8), (2048, 4), (4096, 8), (4096, 16))
]
GRAD_CONFIGS = [
    triton.Config({"BLOCK_V": b}, num_warps=w)
    for b, w in ((4096, 8), (2048, 4), (8192, 8), (2048, 8))
]


def _search(configs: list) -> list:
    return configs if os.environ.get("FASTTR_AUTOTUNE") == "1" else configs[:1]


@triton.jit
def _tanh(x):
    # 1 - e loses digits near 0, where the rational approximation of Cody and Waite (1980) has them
    # all.
    g = x * x
    p = ((-0.96437492777225469787 * g - 99.225929672236083313) * g - 1613.4119023996228053) * g
    q = ((g + 112.74474380534949335) * g + 2233.7720718962312926) * g + 4840.2357071988688686
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.549306144334054845697, x + x * (p / q), tl.where(x < 0, -far, far))


@triton.jit
def _logit(
    raw, Bias, offs_v, mask_v, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr
):
    z = raw
    if HAS_BIAS:
        z += tl.load(Bias + offs_v, mask=mask_v, other=0.0).to(z.dtype)
    if SCALE != 1.0:
        z *= SCALE
    if SOFTCAP is not None:
        z = SOFTCAP * _tanh(z * (1.0 / SOFTCAP))
    return z


@triton.autotune(configs=_search(LOGP_CONFIGS), key=["V"])
@triton.heuristics(
    {"HAS_BIAS": lambda a: a["Bias"] is not None, "STATS": lambda a: a["Entropy"] is not None}
)
@triton.jit
def _logp_kernel(
    Z,  # (C, V) rows of pitch stride_z
    Bias,  # (V,) or None
    Target,  # (C,)
    Logp,  # (C,)
    Top,  # (C,)
    Total,  # (C,)
    Entropy,  # (C,) or None
    Correct,  # (C,) or None
    Mean,  # (C,) or None
    V,
    stride_z,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_c = tl.program_id(0)
    row = Z + pid_c.to(tl.int64) * stride_z
    dtype = Z.dtype.element_ty
    target = tl.load(Target + pid_c)
    known = (target >= 0) & (target < V)
    at_target = _logit(
        tl.load(row + target, mask=known, other=0.0), Bias, target, known, SCALE, SOFTCAP, HAS_BIAS
    )
    top = tl.full((), float("-inf"), dtype)
    total = tl.zeros((BLOCK_V,), dtype)
    if STATS:
        weighted = tl.zeros((BLOCK_V,), dtype)
        plain = tl.zeros((BLOCK_V,), dtype)
        beaten = tl.zeros((BLOCK_V,), tl.int32)
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        # Masked by the pitch, a multiple of 16 elements, so that the load stays wide where V is
        # odd.
        z = tl.load(row + offs_v, mask=offs_v < stride_z, other=0.0)
        z = _logit(z, Bias, offs_v, mask_v, SCALE, SOFTCAP, HAS_BIAS)
        z = tl.where(mask_v, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        drop = tl.where(top == float("-inf"), 0.0, top - shift)
        keep = tl.exp(top - shift)
        e = tl.exp(z - shift)
        if STATS:
            weighted = keep * (weighted + drop * total) + tl.where(e > 0, e * (z - shift), 0.0)
            plain += tl.where(mask_v, z, 0.0)
            beaten |= ((z > at_target) | ((z == at_target) & (offs_v < target))).to(tl.int32)
        total = keep * total + e
        top = new_top
    sum_e = tl.sum(total, 0)
    logp = at_target - top - tl.log(sum_e)
    tl.store(Logp + pid_c, tl.where(known, logp, float("nan")))
    tl.store(Top + pid_c, top)
    tl.store(Total + pid_c, sum_e)
    if STATS:
        tl.store(Entropy + pid_c, tl.log(sum_e) - tl.sum(weighted, 0) / sum_e)
        tl.store(Mean + pid_c, tl.sum(plain, 0) / V)
        tl.store(Correct + pid_c, known & (tl.max(beaten, 0) == 0))


@triton.autotune(configs=_search(GRAD_CONFIGS), key=["V"], restore_value=["Z"])
@triton.heuristics({"HAS_BIAS": lambda a: a["Bias"] is not None})
@triton.jit
def _logit_grad_kernel(
    Z,  # (C, V) rows of pitch stride_z
    Bias,  # (V,) or None
    Target,  # (C,)
    Top,  # (C,)
    Total,  # (C,)
    OnTarget,  # (C,)
    OnSoftmax,  # (C,)
    DZ,  # (C, V) rows of pitch stride_dz; may be Z
    V,
    stride_z,
    stride_dz,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    pid_c = tl.program_id(0)
    pid_v = tl.program_id(1)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    z = tl.load(Z + pid_c.to(tl.int64) * stride_z + offs_v, mask=offs_v < stride_z, other=0.0)
    z = _logit(z, Bias, offs_v, mask_v, SCALE, SOFTCAP, HAS_BIAS)
    on_softmax = tl.load(OnSoftmax + pid_c) / tl.load(Total + pid_c)
    dz = tl.where(offs_v == tl.load(Target + pid_c), tl.load(OnTarget + pid_c), 0.0)
    dz -= on_softmax * tl.exp(z - tl.load(Top + pid_c))
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


class Workspace:
    """The buffers of a chunk: fp32 (fp64) logits, and dZ in the dtype of the products where that is
    another.

    A bf16 dZ never shares storage with fp32 logits: its stores would land on logits that other
    warps have yet to read.
    """

    def __init__(self, rows: int, head: Head, stats: bool, grads: bool):
        vocab, compute = head.weight.shape[0], head.weight.dtype
        wide, device = products.wide(compute), head.weight.device
        pitch = -(-vocab // PITCH) * PITCH
        self.logits = torch.empty(rows, pitch, dtype=wide, device=device)[:, :vocab]
        self.dz = self.logits
        if grads and compute != wide:
            self.dz = torch.empty(rows, pitch, dtype=compute, device=device)[:, :vocab]


def row_logps(
    hidden_CD: Tensor, head: Head, target_C: Tensor, work: Workspace, stats: bool
) -> RowLogps:
    """Log-prob of each row's target, and the statistics in the same sweep. A target outside 0..V-1
    gives NaN."""
    z_CV = work.logits[: hidden_CD.shape[0]]
    products.logits(hidden_CD, head.weight, z_CV)
    return logps_of_logits(z_CV, head, target_C, stats)


def logps_of_logits(z_CV: Tensor, head: Head, target_C: Tensor, stats: bool) -> RowLogps:
    """The launch of `row_logps`; z_CV are raw products in a buffer whose pitch is a multiple of
    `PITCH`."""
    rows, vocab = z_CV.shape
    logp, top, total = (z_CV.new_empty(rows) for _ in range(3))
    entropy, mean = (z_CV.new_empty(rows), z_CV.new_empty(rows)) if stats else (None, None)
    correct = torch.empty(rows, dtype=torch.bool, device=z_CV.device) if stats else None
    with torch.cuda.device_of(z_CV):
        _logp_kernel[(rows,)](
            z_CV,
            head.bias,
            target_C.contiguous(),
            logp,
            top,
            total,
            entropy,
            correct,
            mean,
            vocab,
            z_CV.stride(0),
            SCALE=head.logit_scale,
            SOFTCAP=head.softcap,
        )
    return RowLogps(logp, top, total, entropy, correct, mean)


def refill(hidden_CD: Tensor, head: Head, logps: RowLogps, work: Workspace) -> None:
    """Put a chunk's logits back for `logit_grad` after another chunk has used the buffer."""
    products.logits(hidden_CD, head.weight, work.logits[: hidden_CD.shape[0]])


def logit_grad(
    logps: RowLogps,
    head: Head,
    target_C: Tensor,
    on_target_C: Tensor,
    on_softmax_C: Tensor,
    work: Workspace,
) -> tuple[Tensor, Tensor | None]:
    """dZ = on_target onehot - on_softmax p, chained to the raw products. It has no factor per row
    left to apply."""
    rows = target_C.shape[0]
    z_CV, dz_CV = work.logits[:rows], work.dz[:rows]
    vocab = z_CV.shape[1]
    with torch.cuda.device_of(z_CV):
        _logit_grad_kernel[lambda meta: (rows, triton.cdiv(vocab, meta["BLOCK_V"]))](
            z_CV,
            head.bias,
            target_C.contiguous(),
            logps.top,
            logps.total,
            on_target_C.contiguous(),
            on_softmax_C.contiguous(),
            dz_CV,
            vocab,
            z_CV.stride(0),
            dz_CV.stride(0),
            SCALE=head.logit_scale,
            SOFTCAP=head.softcap,
        )
    return dz_CV, None
