"""Optimizers of every storage, with gradients from a seed, and what they hold."""

from __future__ import annotations

from typing import Any

import torch
from fasttr_kernels import SplitAdamW, adamw_torch
from torch import Tensor, nn

from tests.kernels.accuracy import DEVICE

# One element, fewer than a group, more than a block and not a multiple of one.
SIZES = [1, 100, 1100]
MOMENTS = ["fp32", "bf16", "int8"]
WEIGHTS = ["split", "stochastic", "fp32"]
PATHS = ["torch", "triton"]
OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


def numbers(seed: int, sizes: list[int] = SIZES) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=make) for n in sizes]


def parameters(weights: str, seed: int = 0, sizes: list[int] = SIZES) -> list[nn.Parameter]:
    dtype = torch.bfloat16 if weights == "stochastic" else torch.float32
    return [nn.Parameter(0.02 * x.to(DEVICE, dtype)) for x in numbers(seed, sizes)]


def optimizer(weights: str, moments: str, **options: Any) -> SplitAdamW:
    params = parameters(weights)
    options = {**OPTIONS, "moments": moments, **options}
    if weights == "split":
        return SplitAdamW.from_fp32(params, **options)
    return SplitAdamW(params, split=False, **options)


def params_of(opt: SplitAdamW) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def set_gradients(opt: SplitAdamW, seed: int, dtype: torch.dtype = torch.float32) -> None:
    params = params_of(opt)
    for p, g in zip(params, numbers(seed, [p.numel() for p in params]), strict=True):
        p.grad = None
        p.grad_dtype = dtype
        p.grad = (g * 10.0 ** -(seed % 3)).to(DEVICE, dtype)


def step(
    opt: SplitAdamW, path: str, clip: float = 1.0, alpha: float = 0.0, references=None
) -> None:
    """A step by one of the two paths; on a CPU the kernel is interpreted."""
    items = opt.items(references, alpha)
    if path == "torch":
        adamw_torch.update(items, clip, alpha, opt.seed)
    else:
        from fasttr_kernels import adamw_triton

        adamw_triton.launch(items, torch.tensor(clip, device=DEVICE), alpha, opt.seed)


def everything(opt: SplitAdamW) -> list[Tensor]:
    """Weights and states, as they lie in memory."""
    states = [opt.state[p] for p in params_of(opt)]
    return [*params_of(opt), *(x for state in states for x in state.values())]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    raw = lambda x: x.detach().contiguous().view(-1).view(torch.uint8)  # noqa: E731
    return all(torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True))
