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
from fasttr_kernels.rounding import join_halves, noise_of, round_stochastic, split_halves

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
    if not clip >= 0:
        return
    for item in items:
        scalars = tick(item.clock, item.hyper, clip)
        step = int(item.clock[0])
        for block in _blocks(item.param.numel()):
            _update_block(item.part(block), block, scalars, step, alpha, seed)


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


def _update_block(item: Item, block: slice, s: Scalars, step: int, alpha: float, seed: int) -> None:
    g = item.grad.float() * s.clip
    p = _weights(item) * s.decay
    first, second = decoded(item.moments)
    m = (first * s.beta1).add_(g * s.rest1)
    v = (second * s.beta2).add_((g * s.rest2).mul_(g))
    if item.moments.first.dtype == torch.bfloat16:
        low, high = noise_of(seed, item.number, STREAM_OF_MOMENTS, step, block, p.device)
        item.moments.first.copy_(round_stochastic(m, low))
        item.moments.second.copy_(round_stochastic(v, high))
    else:
        encode(item.moments, m, v)
    denominator = _sqrt(v).mul_(s.inverse).add_(s.eps)
    p.sub_(m.mul_(s.step_size).div_(denominator))
    if item.remainder is not None:
        high, low = split_halves(p)
        item.param.copy_(high)
        item.remainder.copy_(low)
    elif item.param.dtype == torch.bfloat16:
        low, _ = noise_of(seed, item.number, STREAM_OF_WEIGHTS, step, block, p.device)
        item.param.copy_(round_stochastic(p, low))
    else:
        item.param.copy_(p)
    if item.reference is not None and alpha != 0:
        pair = lerp_torch.Item(item.reference, p, item.reference_remainder)
        lerp_torch.update([pair], alpha, False, 0)


def _sqrt(x: Tensor) -> Tensor:
    """Rounded correctly, which torch's own fp32 root on a CPU is not where it runs in vectors."""
    return x.double().sqrt_().float()


def _weights(item: Item) -> Tensor:
    if item.remainder is None:
        return item.param.float()
    return join_halves(item.param, item.remainder)


def decoded(moments: Moments) -> tuple[Tensor, Tensor]:
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
    first, second, first_scale, second_scale = moments
    if first_scale is None or second_scale is None:
        first.copy_(m)
        second.copy_(v)
        return
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
