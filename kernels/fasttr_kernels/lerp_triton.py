"""The reference update in Triton: one launch over a table of pointers for all tensors of a pair of
dtypes.

The table is int64: for each tensor the addresses of reference, policy and remainder, its length and
the number of its first unit. A unit is the run of elements that one program updates.
"""

from __future__ import annotations

import itertools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fasttr_kernels import bits_triton as bits
from fasttr_kernels.lerp_torch import Item

# Long units keep the search for a unit's tensor a small part of its work.
UNIT = 32768
BLOCK = 2048
WARPS = 8
FIELDS = tl.constexpr(5)


@triton.jit
def _block(
    ref,
    pol,
    rem,
    offs,
    mask,
    counter,
    alpha,
    rest,
    seed,
    REF: tl.constexpr,
    SPLIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.load(pol + offs, mask=mask).to(ACC)
    if SPLIT:
        r = bits.join_halves(tl.load(ref + offs, mask=mask), tl.load(rem + offs, mask=mask))
    else:
        r = tl.load(ref + offs, mask=mask).to(ACC)
    out = bits.mix(r, p, alpha, rest)
    if SPLIT:
        high, low = bits.split_halves(out)
        tl.store(ref + offs, high, mask=mask)
        tl.store(rem + offs, low, mask=mask)
    elif tl.bfloat16 == REF:
        x = out.to(tl.float32)
        if STOCHASTIC:
            a, b, c, d = tl.randint4x(seed, counter)
            near = bits.stochastic_bits(x, bits.pieces(a, b, c, d, BLOCK))
        else:
            near = bits.bf16_bits(x)
        tl.store(ref.to(tl.pointer_type(tl.int16)) + offs, near, mask=mask)
    else:
        tl.store(ref + offs, out.to(REF), mask=mask)


@triton.jit(do_not_specialize=["alpha_bits", "seed", "n_tensors", "n_steps"])
def lerp_kernel(
    Table,  # (n_tensors, FIELDS)
    alpha_bits,  # of fp64: a number with a point would arrive as fp32
    seed,
    n_tensors,
    n_steps,  # of the search for a unit's tensor
    REF: tl.constexpr,
    POL: tl.constexpr,
    SPLIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0)
    WIDE: tl.constexpr = (tl.float64 == REF or tl.float64 == POL) and not SPLIT
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    alpha_exact = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
    alpha, rest = alpha_exact.to(ACC), (1.0 - alpha_exact).to(ACC)
    first = 0
    last = n_tensors
    for _ in range(n_steps):
        middle = (first + last) // 2
        right = tl.load(Table + middle * FIELDS + 4) <= unit
        first = tl.where(right, middle, first)
        last = tl.where(right, last, middle)
    entry = Table + first * FIELDS
    ref = tl.load(entry).to(tl.pointer_type(tl.int16 if SPLIT else REF))
    pol = tl.load(entry + 1).to(tl.pointer_type(POL))
    rem = tl.load(entry + 2).to(tl.pointer_type(tl.int16))
    if ALIGNED:
        ref, pol, rem = tl.multiple_of(ref, 16), tl.multiple_of(pol, 16), tl.multiple_of(rem, 16)
    n = tl.load(entry + 3)
    base = (unit - tl.load(entry + 4)) * UNIT
    for start in range(0, UNIT, BLOCK):
        here = base + start
        offs = here + tl.arange(0, BLOCK)
        counter = (unit.to(tl.int64) * UNIT + start) // 8 + tl.arange(0, BLOCK // 8)
        # Whole blocks go unmasked: a mask of unknown length would narrow every access to one
        # element.
        if here + BLOCK <= n:
            _block(
                ref,
                pol,
                rem,
                offs,
                None,
                counter,
                alpha,
                rest,
                seed,
                REF,
                SPLIT,
                STOCHASTIC,
                ACC,
                BLOCK,
            )
        elif here < n:
            _block(
                ref,
                pol,
                rem,
                offs,
                offs < n,
                counter,
                alpha,
                rest,
                seed,
                REF,
                SPLIT,
                STOCHASTIC,
                ACC,
                BLOCK,
            )


def _kind(item: Item) -> tuple[torch.device, torch.dtype, torch.dtype, bool, bool]:
    pointers = [x.data_ptr() for x in item if x is not None]
    aligned = all(p % 16 == 0 for p in pointers)
    return (
        item.reference.device,
        item.reference.dtype,
        item.policy.dtype,
        item.remainder is not None,
        aligned,
    )


def table(items: list[Item]) -> tuple[Tensor, int]:
    """The table of some tensors, on the host, and the number of units."""
    units = [-(-item.reference.numel() // UNIT) for item in items]
    starts = itertools.accumulate(units, initial=0)
    rows = []
    for item, start in zip(items, starts, strict=False):
        low = 0 if item.remainder is None else item.remainder.data_ptr()
        rows.append(
            (item.reference.data_ptr(), item.policy.data_ptr(), low, item.reference.numel(), start)
        )
    return torch.tensor(rows, dtype=torch.int64), sum(units)


def launch(items: list[Item], alpha: float, stochastic: bool, seed: int) -> None:
    """One launch for each device, pair of dtypes and alignment among `items`."""
    kinds: dict[tuple, list[Item]] = {}
    for item in items:
        kinds.setdefault(_kind(item), []).append(item)
    (alpha_bits,) = struct.unpack("<q", struct.pack("<d", alpha))
    for number, ((device, ref, pol, split, aligned), alike) in enumerate(kinds.items()):
        rows, units = table(alike)
        with torch.cuda.device_of(alike[0].reference):
            lerp_kernel[(units,)](
                bits.to_device(rows, device),
                alpha_bits,
                # Launches would otherwise draw the same bits for the same position.
                seed + number,
                len(alike),
                len(alike).bit_length(),
                REF=bits.TYPES[ref],
                POL=bits.TYPES[pol],
                SPLIT=split,
                STOCHASTIC=stochastic and ref == torch.bfloat16,
                ALIGNED=aligned,
                UNIT=UNIT,
                BLOCK=BLOCK,
                num_warps=WARPS,
                # A product and a sum, each rounded: the bits of the torch path.
                enable_fp_fusion=False,
            )
