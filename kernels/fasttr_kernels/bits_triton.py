"""Triton functions on bf16 and the 16 bits below it, shared by the kernels that keep weights in
halves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


@triton.jit
def bf16_bits(x):
    """Nearest-even bf16 of fp32, as int16 bits; written out because Triton's interpreter
    truncates."""
    u = x.to(tl.int32, bitcast=True)
    near = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where(x != x, (u >> 16) | 0x40, near).to(tl.int16)


@triton.jit
def stochastic_bits(x, noise):
    """bf16 below or above fp32, by 16 random bits; what is not finite rounds to nearest."""
    noisy = (x.to(tl.int32, bitcast=True) + noise) >> 16
    return tl.where(tl.abs(x) < float("inf"), noisy.to(tl.int16), bf16_bits(x))


@triton.jit
def store_bf16(pointer, offs, int16_bits, mask):
    """Store bits: what the interpreter stores to bf16 as a number is truncated."""
    tl.store(pointer.to(tl.pointer_type(tl.int16)) + offs, int16_bits, mask=mask)


@triton.jit
def join_halves(high, low):
    """The fp32 number of two int16 halves."""
    return ((high.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_halves(x):
    """The int16 halves of fp32, ties away from zero."""
    u = x.to(tl.int32, bitcast=True)
    high = (u + 0x8000) >> 16
    return high.to(tl.int16), (u - (high << 16)).to(tl.int16)


@triton.jit
def pieces(a, b, c, d, BLOCK: tl.constexpr):
    """The 16-bit pieces of four words for each 8 of BLOCK neighbours, which lie in one thread."""
    words = tl.join(tl.join(a, b), tl.join(c, d)).reshape((BLOCK // 2,)).to(tl.uint32, bitcast=True)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)


@triton.jit
def mix(r, p, alpha, rest):
    """r + alpha (p - r) from the nearer end, a product and a sum: exact at both ends."""
    step = p - r
    out = tl.where(alpha < 0.5, r + alpha * step, p - rest * step)
    return tl.where(alpha == 1.0, p, out)


def to_device(rows: Tensor, device: torch.device) -> Tensor:
    """A copy that nothing waits for: from pageable memory it would wait for the device."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows
