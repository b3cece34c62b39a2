"""AdamW in Triton: the launches over tables of pointers.

A table is int64, a row for each parameter; its columns are named in `adamw_kernels`.
"""

from __future__ import annotations

import itertools
import struct
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fasttr_kernels import adamw_kernels as kernels
from fasttr_kernels import adamw_torch
from fasttr_kernels import bits_triton as bits
from fasttr_kernels.adamw_torch import Item

# Long units keep the search for a unit's parameter a small part of its work.
UNIT = 32768
WARPS = 4
SQUARES_BLOCK = 1024
CONSTANTS = {
    "UNIT": UNIT,
    "INVERSE_127": adamw_torch.INVERSE_127,
    "INVERSE_255": adamw_torch.INVERSE_255,
}


def launch(items: list[Item], clip: Tensor, alpha: float, seed: int) -> None:
    """One step of all items, which lie on the device of `clip`, (): two launches for each kind of
    storage."""
    kinds: dict[tuple, list[Item]] = {}
    for item in items:
        kinds.setdefault(tuple(kind(item, alpha).items()), []).append(item)
    (alpha_bits,) = struct.unpack("<q", struct.pack("<d", alpha))
    for flags, alike in kinds.items():
        rows, units = table(alike)
        with torch.cuda.device_of(clip):
            on_device = bits.to_device(rows, clip.device)
            scalars = torch.empty(len(alike), kernels.SCALARS.value, device=clip.device)
            kernels.clock_kernel[(len(alike),)](
                on_device, clip, scalars, num_warps=1, enable_fp_fusion=False
            )
            kernels.adamw_kernel[(units,)](
                on_device,
                scalars,
                alpha_bits,
                seed,
                len(alike),
                len(alike).bit_length(),
                **dict(flags),
                **CONSTANTS,
                num_warps=WARPS,
                maxnreg=most_registers(dict(flags)),
                # Each operation rounds, as on a CPU.
                enable_fp_fusion=False,
            )


def _tensors(item: Item) -> tuple[Tensor | None, ...]:
    """In the order of the columns."""
    first, second, first_scale, second_scale = item.moments
    return (
        item.param,
        item.remainder,
        item.grad,
        first,
        second,
        first_scale,
        second_scale,
        item.reference,
        item.reference_remainder,
        item.clock,
    )


def kind(item: Item, alpha: float) -> dict[str, Any]:
    """What a launch is compiled for: items that agree in it share one."""
    split = item.remainder is not None
    first, second = item.moments.first.dtype, item.moments.second.dtype
    # A thread stores 16 bytes at a time: with 8 elements of fp32 the compiler would pass what it
    # stores to other threads.
    stored = (item.param, item.moments.first, item.reference)
    fp32_stored = any(x is not None and x.dtype == torch.float32 for x in stored)
    return {
        "P": tl.int16 if split else bits.TYPES[item.param.dtype],
        "G": bits.TYPES[item.grad.dtype],
        "M1": bits.TYPES[first],
        "M2": bits.TYPES[second],
        "SPLIT": split,
        "NOISY_WEIGHTS": not split and item.param.dtype == torch.bfloat16,
        "NOISY_MOMENTS": first == torch.bfloat16,
        "COMPANDED": first == torch.int8,
        "FOLLOWED": item.reference is not None and alpha != 0,
        "REFERENCE_SPLIT": item.reference_remainder is not None,
        "BLOCK": 32 * WARPS * (4 if fp32_stored else 8),
        "ALIGNED": all(x is None or x.data_ptr() % 16 == 0 for x in _tensors(item)),
    }


def most_registers(kind: dict[str, Any]) -> int | None:
    """With little to hold the assembler aims at 40 registers, and spills on one chip."""
    return None if kind["COMPANDED"] or kind["NOISY_MOMENTS"] else 64


def table(items: list[Item]) -> tuple[Tensor, int]:
    """The table of some parameters, on the host, and the number of units."""
    units = [-(-item.param.numel() // UNIT) for item in items]
    rows = []
    for item, unit in zip(items, itertools.accumulate(units, initial=0), strict=False):
        pointers = (0 if x is None else x.data_ptr() for x in _tensors(item))
        hyper = struct.unpack("<5q", struct.pack("<5d", *item.hyper))
        rows.append((*pointers, item.number, *hyper, item.param.numel(), unit))
    return torch.tensor(rows, dtype=torch.int64), sum(units)


def squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of flat gradients on a device, (), fp64."""
    kinds: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.dtype, grad.data_ptr() % 16 == 0), []).append(grad)
    sums = []
    for (dtype, aligned), alike in kinds.items():
        units = [-(-x.numel() // UNIT) for x in alike]
        first = itertools.accumulate(units, initial=0)
        rows = [(x.data_ptr(), x.numel(), unit) for x, unit in zip(alike, first, strict=False)]
        with torch.cuda.device_of(alike[0]):
            of_units = torch.empty(sum(units), dtype=torch.float64, device=device)
            kernels.squares_kernel[(sum(units),)](
                bits.to_device(torch.tensor(rows, dtype=torch.int64), device),
                of_units,
                len(alike),
                len(alike).bit_length(),
                G=bits.TYPES[dtype],
                ALIGNED=aligned,
                UNIT=UNIT,
                BLOCK=SQUARES_BLOCK,
                num_warps=WARPS,
            )
            sums.append(of_units.sum())
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device=device)
