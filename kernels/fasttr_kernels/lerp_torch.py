"""The reference update in torch: CPU tensors, and any layout that the kernel does not take."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels.rounding import join_halves, round_stochastic, split_halves

# Elements of a block for each thread: few enough that what is made on the way stays in a thread's
# cache, many enough that threads are seldom waited for.
BLOCK = 1 << 17
# Blocks of random numbers are part of what a seed means.
STOCHASTIC_BLOCK = 1 << 17


class Item(NamedTuple):
    """One flat pair on one device; `remainder` is the low half of a split reference."""

    reference: Tensor  # (n,)
    policy: Tensor  # (n,)
    remainder: Tensor | None  # (n,) int16


def rounds_as_torch(
    reference: Tensor, policy: Tensor, remainder: Tensor | None, alpha: float
) -> bool:
    """Whether torch's lerp gives the same bits on a CPU, in one sweep. It fuses the product and the
    sum where it runs in vectors; with a power of two the product is exact (above 1e-38)."""
    return (
        remainder is None
        and reference.dtype == policy.dtype
        and math.frexp(alpha)[0] == 0.5
        and alpha != 1
        and reference.device == policy.device
        and reference.device.type == "cpu"
    )


def update(items: list[Item], alpha: float, stochastic: bool, seed: int) -> None:
    """Move the references of flat items; equal to the kernel bit for bit, but for random bits."""
    scratch = _Scratch(max((x.reference.numel() for x in items), default=0))
    generators: dict[torch.device, torch.Generator] = {}
    for item in items:
        device = item.reference.device
        if item.remainder is not None:
            _update_split(item, alpha, scratch)
        elif stochastic and item.reference.dtype == torch.bfloat16:
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            _update_stochastic(item, alpha, scratch, generators[device])
        elif alpha == 1:
            item.reference.copy_(item.policy)
        else:
            _update_plain(item, alpha, scratch)


def _update_plain(item: Item, alpha: float, scratch: _Scratch) -> None:
    reference, policy, _ = item
    wide = wide_dtype(reference, policy)
    for narrow, p in _blocks(scratch.block, reference, policy):
        if narrow.dtype == wide:
            scratch.mix(narrow, p, alpha, out=narrow)
        else:
            narrow.copy_(scratch.mix(scratch.widened(narrow, wide), p, alpha))


def _update_split(item: Item, alpha: float, scratch: _Scratch) -> None:
    assert item.remainder is not None
    for high, p, low in _blocks(scratch.block, item.reference, item.policy, item.remainder):
        new_high, new_low = split_halves(scratch.mix(join_halves(high, low), p, alpha))
        high.copy_(new_high)
        low.copy_(new_low)


def _update_stochastic(
    item: Item, alpha: float, scratch: _Scratch, generator: torch.Generator
) -> None:
    wide = wide_dtype(item.reference, item.policy)
    for narrow, p in _blocks(STOCHASTIC_BLOCK, item.reference, item.policy):
        mixed = scratch.mix(scratch.widened(narrow, wide), p, alpha).float()
        noise = torch.randint(
            0, 1 << 16, mixed.shape, generator=generator, dtype=torch.int32, device=mixed.device
        )
        narrow.copy_(round_stochastic(mixed, noise))


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: fp64 where any is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _blocks(size: int, *flat: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same run of elements of each tensor, in turn."""
    if flat[0].numel() <= size:
        return [flat]
    return zip(*(x.split(size) for x in flat), strict=True)


class _Scratch:
    """Memory for a block, made once for a call: fresh memory costs more than the arithmetic,
    because its pages are faulted in anew."""

    def __init__(self, elements: int):
        self.block = BLOCK * torch.get_num_threads()
        self._size = min(self.block, elements)
        self._kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def _of(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Two buffers as long as x, and a one."""
        key = (x.device, dtype)
        if key not in self._kept:
            two = torch.empty(2, self._size, dtype=dtype, device=x.device)
            self._kept[key] = (two[0], two[1], torch.ones((), dtype=dtype, device=x.device))
        a, b, one = self._kept[key]
        n = x.numel()
        return a[:n], b[:n], one

    def widened(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of x for `mix`."""
        return self._of(x, dtype)[0].copy_(x)

    def mix(self, r: Tensor, policy: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
        """The lerp in the dtype of r, from the nearer end: exact at both.

        A product, then a sum, each rounded: `addcmul` may fuse its sum with its last product alone,
        here that by one. `torch.lerp` and `torch.add(..., alpha=...)` fuse the other one where they
        run in vectors, so that their bits depend on where a block ends. So two sweeps are the
        fewest.
        """
        a, b, one = self._of(r, r.dtype)
        out = a if out is None else out
        same = policy.dtype == r.dtype and policy.device == r.device
        p = policy if same else b.copy_(policy)
        if alpha == 1:
            return p
        if alpha < 0.5:
            return torch.addcmul(r, torch.sub(p, r, out=b), one, value=alpha, out=out)
        return torch.addcmul(p, torch.sub(p, r, out=a), one, value=alpha - 1, out=out)
