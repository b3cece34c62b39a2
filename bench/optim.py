"""One optimizer step over the parameters of real models: bytes per second, and share of a
device-to-device copy.

    python -m bench optim --models llama-3-8b-layer --providers fasttr,torch

`NAME-layer` are the matrices of one decoder layer. Bytes are counted, not measured: what is needed
is read once and written once.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fasttr_kernels import SplitAdamW
from torch import Tensor, nn

from bench.harness import Bars, Benchmark, Case, Contender, add_common_arguments, compare
from bench.lerp import COPY, bandwidth
from bench.shapes import SHAPES
from bench.text import by_median, mib, reasons, spread, titled

LR = 0.05  # far enough that the movement is seen in bf16 weights too
BETAS = (0.9, 0.999)
EPS = 1e-8
CHECKED_STEPS = 3
# Relative errors of the whole movement after CHECKED_STEPS that the storage of weights and moments
# explains.
FP32_STORAGE = 1e-3
BF16_STORAGE = 3e-2
INT8_STORAGE = 0.2
SETTINGS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}


class Provider(NamedTuple):
    """An optimizer. `moved` counts the bytes a parameter that its step reads and writes."""

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    moved: float
    allowed: float  # error of the movement
    weights: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32
    needs: str | None = None  # package
    cuda_only: bool = False

    def absent(self, device: torch.device) -> str | None:
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"not installed: {self.needs}"
        return "needs a GPU" if self.cuda_only and device.type != "cuda" else None


def _split(moments: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return SplitAdamW.from_fp32(parameters, moments=moments, **SETTINGS)

    return make


def _torch(**how: bool) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, **SETTINGS, **how)


def _torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, **SETTINGS)


def _flashoptim(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(parameters, master_weight_bits=32, **SETTINGS)


BF16 = torch.bfloat16
# Weights and gradients are read, weights written, moments read and written.
PROVIDERS = {
    "fasttr, fp32 moments": Provider(_split("fp32"), 28, FP32_STORAGE),
    "fasttr, bf16 moments": Provider(_split("bf16"), 20, BF16_STORAGE),
    "fasttr, 8-bit moments": Provider(_split("int8"), 16.12, INT8_STORAGE),
    "torch fused": Provider(_torch(fused=True), 28, FP32_STORAGE),
    "torch foreach": Provider(_torch(foreach=True), 28, FP32_STORAGE),
    "torchao AdamW8bit": Provider(_torchao, 16.1, INT8_STORAGE, needs="torchao"),
    "flashoptim FlashAdamW": Provider(
        _flashoptim, 14.3, INT8_STORAGE, BF16, BF16, needs="flashoptim", cuda_only=True
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    default = "llama-3-8b-layer,llama-3.2-1b" if gpu else "tiny,10m"
    parser.add_argument("--models", default=default, help="of bench/shapes.py, or NAME-layer")
    parser.add_argument(
        "--providers", default="", help="beginnings of names, comma-separated; none: all"
    )
    add_common_arguments(parser, "runs/optim", seconds=4.0)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    begins = tuple(args.providers.split(","))
    names = [name for name in PROVIDERS if name.startswith(begins)]
    for model in args.models.split(","):
        yield {"model": model} | measure(sizes_of(model), names, device, args.seconds)


def sizes_of(model: str) -> list[tuple[int, ...]]:
    if model.endswith("-layer"):
        return list(SHAPES[model.removesuffix("-layer")].matrices().values())
    return SHAPES[model].tensors()


def measure(
    sizes: list[tuple[int, ...]], names: list[str], device: torch.device, seconds: float
) -> Case:
    """All providers on parameters of these shapes, one after the other: their states do not fit
    beside each other."""
    why_absent = {name: PROVIDERS[name].absent(device) for name in names}
    absent = {name: why for name, why in why_absent.items() if why is not None}
    rows: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in names:
        if name in absent:
            continue
        optimizer = Optimizer(PROVIDERS[name], sizes, device)
        contender = Contender(call=optimizer.step, check=optimizer.wrong)
        found = compare(
            {name: contender}, device, seconds=seconds, yardsticks={COPY: optimizer.copy}
        )
        absent |= found.absent
        wrong |= found.wrong
        copy_rate = 2 * 4 * optimizer.count / found.times[COPY].median
        if name in found.times:
            moved = int(PROVIDERS[name].moved * optimizer.count)
            rows[name] = bandwidth(found.times[name], moved, copy_rate)
            rows[name] |= {"state_bytes": optimizer.state_bytes(), "error": optimizer.error}
    return {
        "parameters": sum(torch.Size(size).numel() for size in sizes),
        "tensors": len(sizes),
        "device": str(device),
        "providers": rows,
        "absent": absent,
        "wrong": wrong,
    }


class Optimizer:
    """An optimizer with parameters and gradients of its own, made when they are needed."""

    def __init__(self, provider: Provider, sizes: list[tuple[int, ...]], device: torch.device):
        self.provider = provider
        self.sizes = sizes
        self.device = device
        self.count = sum(torch.Size(size).numel() for size in sizes)
        self.error = float("nan")
        self._copies: tuple[Tensor, Tensor] | None = None
        self._ready: tuple[list[nn.Parameter], torch.optim.Optimizer] | None = None

    def step(self) -> None:
        if self._ready is None:
            self._ready = self._made(self.sizes, seed=0)
            parameters, _ = self._ready
            for parameter in parameters:
                self._give(parameter, torch.randn_like(parameter))
        self._ready[1].step()

    def copy(self) -> None:
        """As many fp32 numbers as there are parameters, read and written."""
        if self._copies is None:
            self._copies = (
                torch.empty(self.count, device=self.device),
                torch.randn(self.count, device=self.device),
            )
        target, source = self._copies
        target.copy_(source)

    def wrong(self) -> str:
        """Empty, or how far a few steps on small parameters lie from AdamW in fp64."""
        parameters, optimizer = self._made([(64, 256), (300,)], seed=1)
        before = _masters(optimizer, parameters)
        exact = _Exact(before)
        make = torch.Generator(self.device).manual_seed(2)
        for _ in range(CHECKED_STEPS):
            for parameter in parameters:
                drawn = torch.randn(parameter.shape, generator=make, device=self.device)
                self._give(parameter, drawn)
            exact.step([parameter.grad for parameter in parameters if parameter.grad is not None])
            optimizer.step()
        moved = _flat(exact.weights) - _flat(before)
        found = _flat(_masters(optimizer, parameters)) - _flat(before)
        self.error = float((found - moved).norm() / moved.norm())
        if self.error <= self.provider.allowed:
            return ""
        return f"the movement is off by {self.error:.1e}, allowed {self.provider.allowed:.0e}"

    def _give(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """A gradient in a dtype that may differ from the parameter's."""
        parameter.grad_dtype = self.provider.gradients
        parameter.grad = gradient.to(self.provider.gradients)

    def state_bytes(self) -> int:
        """Of every tensor that the optimizer keeps."""
        assert self._ready is not None
        values = [value for state in self._ready[1].state.values() for value in state.values()]
        return sum(_bytes_of(value) for value in values if isinstance(value, Tensor))

    def _made(
        self, sizes: list[tuple[int, ...]], seed: int
    ) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        make = torch.Generator(self.device).manual_seed(seed)
        drawn = [torch.randn(size, generator=make, device=self.device) for size in sizes]
        parameters = [nn.Parameter(x.to(self.provider.weights)) for x in drawn]
        return parameters, self.provider.make(parameters)


class _Exact:
    """AdamW in fp64 without weight decay (arXiv:1711.05101, algorithm 2)."""

    def __init__(self, weights: list[Tensor]):
        self.weights = [x.clone() for x in weights]
        self.first = [torch.zeros_like(x) for x in weights]
        self.second = [torch.zeros_like(x) for x in weights]
        self.steps = 0

    def step(self, gradients: list[Tensor]) -> None:
        self.steps += 1
        beta1, beta2 = BETAS
        tensors = zip(self.weights, gradients, self.first, self.second, strict=True)
        for weight, gradient, first, second in tensors:
            g = gradient.double()
            first.mul_(beta1).add_((1 - beta1) * g)
            second.mul_(beta2).add_((1 - beta2) * g * g)
            unbiased = first / (1 - beta1**self.steps)
            scale = (second / (1 - beta2**self.steps)).sqrt() + EPS
            weight.sub_(LR * unbiased / scale)


def _masters(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The numbers that steps are made on: more than the parameters where an optimizer keeps the
    bits that are rounded off them."""
    master = getattr(optimizer, "master", Tensor.detach)
    return [master(parameter).double() for parameter in parameters]


def _bytes_of(x: Tensor) -> int:
    """Of a tensor, or of those that a wrapper of several stands for."""
    if not hasattr(x, "__tensor_flatten__"):
        return x.numel() * x.element_size()
    names, _ = x.__tensor_flatten__()
    return sum(_bytes_of(getattr(x, name)) for name in names)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


COLUMNS = ("optimizer", "ms (p20 to p80)", "GB/s", "share of the copy", "states, MiB", "error")


def table(case: Case) -> str:
    rows = [
        [
            name,
            spread(row, 1e-3),
            f"{row['gb_per_s']:.3g}",
            f"{row['share_of_copy']:.0%}",
            mib(row["state_bytes"]),
            f"{row['error']:.0e}",
        ]
        for name, row in by_median(case["providers"])
    ]
    title = (
        f"{case['model']} ({case['parameters'] / 1e6:,.1f} M parameters in {case['tensors']} "
        f"tensors); error: of the movement over {CHECKED_STEPS} steps, against fp64"
    )
    return titled(title, COLUMNS, rows + reasons(case, len(COLUMNS)))


BENCHMARK = Benchmark(
    name="optim",
    title="The optimizer's step",
    cases=cases,
    table=table,
    bars=Bars("providers", "share_of_copy", "share of the copy's bandwidth"),
)
