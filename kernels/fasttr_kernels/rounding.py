"""bf16 and the 16 bits below it, in torch: halves of fp32 numbers, stochastic rounding, and the
random bits that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 number of which a bf16 `high` and an int16 `low` are the halves."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low)
    return bits.view(torch.float32)


def split_halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16 high, int16 low) of fp32 numbers. Ties round away from zero, which keeps `low` in 16
    bits."""
    bits = value.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def round_stochastic(value: Tensor, noise: Tensor) -> Tensor:
    """bf16 below or above fp32 numbers, with the odds that make the mean exact for `noise` of 16
    random bits (int32); what is not finite stays."""
    up = (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), up, value).to(torch.bfloat16)


def noise_of(
    seed: int, number: int, stream: int, step: int, elements: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Twice 16 random bits for elements of tensor `number`, int32: what the kernels draw. A call of
    Philox serves 4 neighbours; `elements` starts at a multiple of 4."""
    counter = torch.arange(elements.start // 4, -(-elements.stop // 4), device=device)
    same = torch.ones_like(counter)
    a, b, c, d = philox((counter, same * number, same * stream, same * step), seed)
    words = torch.stack([a, c, b, d], dim=1).flatten()[: elements.stop - elements.start]
    return (words & 0xFFFF).to(torch.int32), (words >> 16).to(torch.int32)


def philox(counter: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405) of four int64
    tensors of 32-bit words, under a key of 64 bits."""
    c0, c1, c2, c3 = counter
    key0, key1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((second >> 32) & MASK) ^ c1 ^ key0
        c1 = second & MASK
        c2 = ((first >> 32) & MASK) ^ c3 ^ key1
        c3 = first & MASK
        key0 = (key0 + 0x9E3779B9) & MASK
        key1 = (key1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3
