"""AdamW in torch, for CPU tensors: each operation rounded, in the order of the kernel, so that both
give the same bits.

Moments of 8 bits are companded in groups of 128: code / 127 is the signed fourth root of a first
moment over the largest of its group, code / 255 the eighth root of a second one. A second moment
above 0 never gets code 0, where its parameter would run off.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fasttr_kernels import lerp_torch
from fasttr_kernels.rounding import noise_of, round_stochastic

# Elements of a block: what is made on the way stays in a cache. A multiple of GROUP.
BLOCK = 1 << 16
# Elements that share a scale of an 8-bit moment.
GROUP = 128
# Below the normal numbers of fp32 a reciprocal overflows.
TINY = 2.0**-126
# First and second moments as they are stored.
MOMENTS = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
STREAM_OF_MOMENTS = 0
STREAM_OF_WEIGHTS = 1


class Hyper(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Moments(NamedTuple):
    """fp32, bf16, or int8 and uint8 with fp32 scales (ceil(n / GROUP),)."""

    first: Tensor  # (n,)
    second: Tensor  # (n,)
    first_scale: Tensor | None
    second_scale: Tensor | None


class Item(NamedTuple):
    """One flat parameter with its gradient and its state. `clock` is (steps, beta1^steps,
    beta2^steps), fp64."""

    number: int  # of the parameter in its optimizer
    param: Tensor  # (n,)
    remainder: Tensor | None  # (n,) int16
    grad: Tensor  # (n,)
    moments: Moments
    clock: Tensor  # (3,)
    hyper: Hyper
    reference: Tensor | None  # (n,)
    reference_remainder: Tensor | None  # (n,) int16

    def part(self, block: slice) -> Item:
        """Views of a block that starts at a multiple of GROUP."""
        some = lambda x: None if x is None else x[block]  # noqa: E731
        groups = slice(block.start // GROUP, -(-block.stop // GROUP))
        first, second, *scales = self.moments
        moments = Moments(
            first[block], second[block], *(None if x is None else x[groups] for x in scales)
        )
        return self._replace(
            param=self.param[block],
            remainder=some(self.remainder),
            grad=self.grad[block],
            moments=moments,
            reference=some(self.reference),
            reference_remainder=some(self.reference_remainder),
        )


class Scalars(NamedTuple):
    """Of one parameter's step, each rounded to fp32."""

    clip: float
    decay: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    step_size: float
    inverse: float  # 1 / sqrt(1 - beta2^steps)
    eps: float


def update(items: list[Item], clip: float, alpha: float, seed: int) -> None:
    """One step, and the lerp of the references by alpha. Nothing where clip is below 0 or NaN."""
    if not clip >= 0 or not items:
        return
    scratch = _Scratch(max(item.param.numel() for item in items), items[0].param.device)
    for item in items:
        scalars = tick(item.clock, item.hyper, clip)
        step = int(item.clock[0])
        for block in _blocks(item.param.numel()):
            _update_block(item.part(block), block, scalars, step, alpha, seed, scratch)


def tick(clock: Tensor, hyper: Hyper, clip: float) -> Scalars:
    """Move a clock by one step; the scalars of that step, in fp64 until they are rounded."""
    steps, power1, power2 = clock.tolist()
    power1, power2 = power1 * hyper.beta1, power2 * hyper.beta2
    clock.copy_(torch.tensor([steps + 1, power1, power2], dtype=torch.float64))
    exact = Scalars(
        clip=clip,
        decay=1 - hyper.lr * hyper.weight_decay,
        beta1=hyper.beta1,
        rest1=1 - hyper.beta1,
        beta2=hyper.beta2,
        rest2=1 - hyper.beta2,
        step_size=hyper.lr / (1 - power1),
        inverse=1 / math.sqrt(1 - power2),
        eps=hyper.eps,
    )
    return Scalars(*(struct.unpack("f", struct.pack("f", x))[0] for x in exact))


def _blocks(elements: int) -> Iterator[slice]:
    for start in range(0, elements, BLOCK):
        yield slice(start, min(start + BLOCK, elements))


class _Scratch:
    """Memory for what is made on the way, once for a step: fresh memory costs more than the
    arithmetic, because its pages are faulted in anew."""

    def __init__(self, elements: int, device: torch.device):
        size = min(BLOCK, elements)
        self.fp64 = torch.empty(size, dtype=torch.float64, device=device)
        self.fp32 = torch.empty(2, size, device=device)
        self.int32 = self.fp32[1].view(torch.int32)  # once the denominator has been used
        self.one = torch.ones((), device=device)


def _update_block(
    item: Item, block: slice, s: Scalars, step: int, alpha: float, seed: int, scratch: _Scratch
) -> None:
    n = item.param.numel()
    g = item.grad
    if g.dtype != torch.float32 or s.clip != 1:
        g = scratch.fp32[0, :n].copy_(item.grad).mul_(s.clip)
    # In place where moments and weights are fp32. Each operation is rounded: addcmul may fuse its
    # sum with its last product alone, here that by one, and addcdiv fuses nothing.
    m, v = decoded(item.moments)
    m.mul_(s.beta1).addcmul_(g, scratch.one, value=s.rest1)
    v.mul_(s.beta2).add_(torch.mul(g, s.rest2, out=scratch.fp32[1, :n]).mul_(g))
    if item.moments.first.dtype == torch.bfloat16:
        low, high = noise_of(seed, item.number, STREAM_OF_MOMENTS, step, block, g.device)
        item.moments.first.copy_(round_stochastic(m, low))
        item.moments.second.copy_(round_stochastic(v, high))
    elif item.moments.first_scale is not None:
        encode(item.moments, m, v)
    root = scratch.fp32[1, :n].copy_(scratch.fp64[:n].copy_(v).sqrt_())
    denominator = root.mul_(s.inverse).add_(s.eps)
    p = _weights(item, scratch).mul_(s.decay).addcdiv_(m, denominator, value=-s.step_size)
    if item.reference is not None and alpha != 0:
        pair = lerp_torch.Item(item.reference, p, item.reference_remainder)
        lerp_torch.update([pair], alpha, False, 0)
    if item.remainder is not None:
        _store_halves(p, item.param, item.remainder, scratch.int32[:n])
    elif item.param.dtype == torch.bfloat16:
        low, _ = noise_of(seed, item.number, STREAM_OF_WEIGHTS, step, block, p.device)
        item.param.copy_(round_stochastic(p, low))


def _weights(item: Item, scratch: _Scratch) -> Tensor:
    """The fp32 numbers that a step is made on: an fp32 parameter itself."""
    if item.param.dtype == torch.float32:
        return item.param
    # The gradient has been used: its place is free.
    p = scratch.fp32[0, : item.param.numel()].copy_(item.param)
    if item.remainder is not None:
        p.view(torch.int32).add_(item.remainder)
    return p


def _store_halves(value: Tensor, high: Tensor, low: Tensor, scratch: Tensor) -> None:
    """`split_halves` into place; `value` is used up."""
    bits = value.view(torch.int32)
    torch.add(bits, 0x8000, out=scratch).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(scratch)
    low.copy_(bits.sub_(scratch.bitwise_left_shift_(16)))


def _sqrt(x: Tensor) -> Tensor:
    """Rounded correctly, which torch's own fp32 root on a CPU is not where it runs in vectors."""
    return x.double().sqrt_().float()


def decoded(moments: Moments) -> tuple[Tensor, Tensor]:
    """In fp32: copies, but of fp32 moments themselves."""
    first, second, first_scale, second_scale = moments
    if first_scale is None or second_scale is None:
        return first.float(), second.float()
    root = first.float() * INVERSE_127
    fourth = (root * root).mul_(root * root.abs())
    root = second.float() * INVERSE_255
    square = root * root
    eighth = (square * square).mul_(square * square)
    n = first.numel()
    return (
        fourth.mul_(first_scale.repeat_interleave(GROUP)[:n]),
        eighth.mul_(second_scale.repeat_interleave(GROUP)[:n]),
    )


INVERSE_127, INVERSE_255 = (torch.tensor(1 / x).item() for x in (127, 255))


def encode(moments: Moments, m: Tensor, v: Tensor) -> None:
    """Store moments of 8 bits."""
    first, second, first_scale, second_scale = moments
    assert first_scale is not None
    assert second_scale is not None
    largest, root = _scaled(m.abs())
    code = _sqrt(_sqrt(root)).mul_(127).add_(0.5).floor_().flatten()[: m.numel()]
    first_scale.copy_(largest)
    first.copy_(torch.where(m < 0, -code, code))
    largest, root = _scaled(v)
    code = _sqrt(_sqrt(_sqrt(root))).mul_(255).add_(0.5).floor_()
    code = code.flatten()[: v.numel()]
    second_scale.copy_(largest)
    second.copy_(torch.where((v > 0) & (code < 1), 1.0, code))


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each group, and the numbers over it."""
    groups = pad(x, (0, -x.numel() % GROUP)).view(-1, GROUP)
    largest = groups.amax(1)
    inverse = torch.where(largest >= TINY, 1 / largest, 0.0)
    return largest, groups * inverse[:, None]


def squares(grads: list[Tensor]) -> Tensor:
    """The sum of squares of flat gradients, (), fp64: squares in fp32, sums in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for grad in grads:
        for block in _blocks(grad.numel()):
            g = grad[block].float()
            total += (g * g).sum(dtype=torch.float64)
    return total
