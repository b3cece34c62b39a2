"""Every launch of the package, made by its own code on CPU tensors and compiled for an H100 that is
not here; nothing runs. Prints a line a launch: its kernel and its grid.

Numbers at the ends of 32 and 64 bits, tensors that start at any byte, references or none: what a
launch is specialised for is decided where it is made. Kernels that promise the bits of their torch
path must have no operation that is fused or approximate.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import triton
from fasttr_kernels import SplitAdamW, adamw_triton, gather_triton, lerp_torch, lerp_triton
from fasttr_kernels import rows_triton as rows
from fasttr_kernels.head import Head, RowLogps, Statistics
from fasttr_kernels.rounding import split_halves
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

LARGEST_SEED = 2**63 - 1
AS_ON_A_CPU = ("clock_kernel", "adamw_kernel", "lerp_kernel", "sum_kernel")


class Chip:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    kernel = launched(self, *args, grid=grid, warmup=True, **kwargs)
    if self.__name__ in AS_ON_A_CPU:
        assert not kernel.metadata.enable_fp_fusion or self.__name__ == "sum_kernel"
        assert not re.findall(r"\b(?:fma|div\.full|\w+\.approx)\S*", kernel.asm["ptx"])
    named = dict(zip(self.arg_names, args, strict=False)) | kwargs
    sizes = grid(named) if callable(grid) else grid
    assert 0 < sizes[0] < 2**31
    assert all(0 < size < 2**16 for size in sizes[1:])
    print(self.__name__, *sizes)


launched = jit.JITFunction.run


def main() -> None:
    driver.set_active(Chip())
    jit.JITFunction.run = compile_alone
    head()
    optimizer()
    reference()
    attention()


def head() -> None:
    """A chunk of an odd vocabulary, and a piece that starts anywhere."""
    vocabulary, hidden = 301, 16
    capped = Head(torch.zeros(vocabulary, hidden).bfloat16(), torch.zeros(vocabulary), 0.5, 30.0)
    plain = Head(torch.zeros(vocabulary, hidden), None, 1.0, None)
    for one, statistics in ((plain, Statistics()), (capped, Statistics(True, True))):
        work = rows.Workspace(7, 512, one, stats=True, grads=True)
        for piece in (slice(0, 7), slice(1, 2)):
            x = torch.zeros(7, hidden, dtype=one.weight.dtype)[piece]
            target, weights = torch.zeros(7).long()[piece], torch.zeros(7)[piece]
            out = RowLogps.empty(x.device, 7, torch.float32, statistics).part(piece)
            rows.row_logps(x, one, target, work, out)
            on_entropy = weights if one is capped else None
            rows.logit_grad(out, one, target, weights, weights, work, on_entropy)
    for size in (1, 48, 4097):
        rows.scale_(torch.zeros(size), torch.ones(()))


def optimizer() -> None:
    step("fp32", True, 0, gradient=torch.bfloat16, alpha=0.3, begins=1)
    step("bf16", True, LARGEST_SEED, gradient=torch.float32)
    step("int8", False, 2**31, gradient=torch.bfloat16)


def step(
    moments: str,
    split: bool,
    seed: int,
    gradient: torch.dtype,
    alpha: float = 0.0,
    begins: int = 0,
) -> None:
    """A matrix that starts `begins` elements into its memory, and a bias in fp32."""
    matrix = nn.Parameter(torch.zeros(1300 + begins, dtype=torch.bfloat16)[begins:])
    groups = [{"params": [matrix]}, {"params": [nn.Parameter(torch.zeros(3))], "split": False}]
    made = SplitAdamW(groups, moments=moments, split=split, seed=seed)
    parameters = [p for group in made.param_groups for p in group["params"]]
    for p in parameters:
        p.grad_dtype = None
        p.grad = torch.zeros_like(p, dtype=gradient)
    references = None
    if alpha:
        references = [split_halves(torch.zeros(1300)), (torch.zeros(3), None)]
    squares = adamw_triton.squares([p.grad for p in parameters], torch.device("cpu"))
    clip = torch.ones(()) if alpha else squares  # fp32 where it is given as a number
    adamw_triton.launch(made.items(references, alpha), clip, alpha, seed)


def reference() -> None:
    bf16, fp32 = torch.zeros(1300, dtype=torch.bfloat16), torch.zeros(1300)
    low = torch.zeros(1300, dtype=torch.int16)
    item = lerp_torch.Item
    pairs = [item(fp32, fp32, None), item(bf16, fp32, None), item(bf16, fp32, low)]
    lerp_triton.launch(pairs, 0.3, stochastic=False, seed=0)
    lerp_triton.launch([item(bf16[1:], fp32[1:], None)], 1.0, stochastic=True, seed=LARGEST_SEED)
    lerp_triton.launch([item(bf16, bf16, None)], 2.0**-70, stochastic=True, seed=2**32)


def attention() -> None:
    """Heads first in memory and last, of one row and of many; and rows of no width."""
    sources = torch.zeros(5, dtype=torch.int32)
    offsets, readers = torch.zeros(4, dtype=torch.int32), sources
    for heads, width in ((1, 1), (3, 80)):
        k = torch.zeros(heads, 3, width, dtype=torch.bfloat16).transpose(0, 1)
        for one in (k, k.contiguous()):
            gathered = gather_triton.gather(one, one, sources)
            gather_triton.sum_over_readers(*gathered, offsets, readers)
    alone: Tensor = torch.zeros(5, 1, 33)
    gather_triton.sum_over_readers(alone, alone[:, :, :0], offsets, readers)


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret
    main()
