"""Weights go their way at a rate of 1e-6, whatever the optimizer and however it holds them: rounded
to the nearest bf16 they would hardly move."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import pytest
import torch
from fasttr_kernels.rounding import split_halves
from torch import nn

from fasttr.optim.adamw import LocalRows, OptimizerConfig
from fasttr.optim.matrices import all_matrices
from fasttr.optim.named import OPTIMIZERS
from fasttr.optim.update import MasterAdamW, parameters_of, update
from tests.tiny import packed_tiny

STEPS = 20


class Choice(NamedTuple):
    name: str
    moments: str = "fp32"
    keeps_masters: bool = True
    of_rows: bool = False  # as a process that holds a part of a divided model has it

    def config(self) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=1e-6,
            name=self.name,
            moments=self.moments,
            keeps_masters=self.keeps_masters,
        )


ADAMW = [
    Choice("adamw_torch_fused", moments, keeps_masters, of_rows)
    for moments in ("fp32", "bf16", "int8")
    for keeps_masters in (True, False)
    for of_rows in (False, True)
]
OTHERS = [Choice(name) for name, kind in OPTIMIZERS.items() if not kind.is_adamw]
OF_ROWS = [one._replace(of_rows=True) for one in OTHERS if OPTIMIZERS[one.name].is_elementwise]


def model():
    found = packed_tiny().model
    for p in found.parameters():
        p.data = (p.data.sign() * (0.02 + p.data.abs())).bfloat16().float()
    return found


def first_rows(owner, halves: bool) -> LocalRows:
    """Half the rows of every weight; matrices of layers in bf16 where the optimizer knows it."""
    matrices = all_matrices(owner) if halves else set()
    parameters, remainders = {}, {}
    for name, p in owner.named_parameters():
        content = first_half(p.detach()).clone()
        if p in matrices:
            content, remainders[name] = split_halves(content)
        parameters[name] = nn.Parameter(content)
    return LocalRows(parameters, remainders)


def first_half(x: torch.Tensor) -> torch.Tensor:
    return x[: len(x) // 2]


def way(choice: Choice, bf16: bool) -> torch.Tensor:
    """Where 20 steps lead, in fp64, of the first half of every weight."""
    owner = model()
    halves = choice.config().splits(bf16)
    rows = first_rows(owner, halves) if choice.of_rows and bf16 else None
    optimizer = choice.config().optimizer(owner, bf16=bf16, rows=rows)
    names = [name for group in optimizer.param_groups for name in group["names"]]
    parameters = dict(zip(names, parameters_of(optimizer), strict=True))
    start = {name: value(optimizer, p) for name, p in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in owner.named_parameters()}
    for _ in range(STEPS):
        for name, shape in shapes.items():
            # Of unequal sizes, with a direction.
            whole = torch.randn(shape, generator=generator) + 1.0
            p = parameters[name]
            p.grad = whole[: len(p)].to(p.dtype)
        update(optimizer, owner, loss=torch.zeros(()), max_grad_norm=0.0)
    moved = []
    for name in sorted(shapes):
        way_of_one = value(optimizer, parameters[name]) - start[name]
        moved.append((way_of_one if rows is not None else first_half(way_of_one)).flatten())
    return torch.cat(moved)


def value(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> torch.Tensor:
    whole = optimizer.master(p) if isinstance(optimizer, MasterAdamW) else p
    return whole.detach().double().clone()


@pytest.mark.parametrize("choice", [*ADAMW, *OTHERS, *OF_ROWS])
def test_weights_go_the_way_of_fp32(choice):
    package = OPTIMIZERS[choice.name].package
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    truth = way(Choice(choice.name), bf16=False)
    assert truth.abs().max() > 1e-7
    share = float(way(choice, bf16=True) @ truth / (truth @ truth))
    assert 0.9 <= share <= 1.1
