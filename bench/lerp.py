"""The reference update: bytes per second, and share of a device-to-device copy, on the tensors of
real models.

    python -m bench lerp --models qwen2.5-0.5b,llama-3-8b

Bytes are counted, not measured: each input read once, each output written once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fasttr_kernels import multi_tensor_lerp_
from torch import Tensor

from bench.harness import Bars, Benchmark, Case, Contender, add_common_arguments, compare
from bench.shapes import SHAPES
from bench.text import by_median, reasons, spread, titled
from bench.timing import Times

ALPHA = 0.6
# Relative distance of neighbouring numbers of a dtype, at most.
STEP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}
COPY = "copy"


class Dtypes(NamedTuple):
    reference: torch.dtype
    policy: torch.dtype


CASES = {
    "bf16 <- bf16": Dtypes(torch.bfloat16, torch.bfloat16),
    "bf16 <- fp32": Dtypes(torch.bfloat16, torch.float32),
    "fp32 <- fp32": Dtypes(torch.float32, torch.float32),
}


class Weights(NamedTuple):
    """The tensors of an update; `remainders` are there for bf16 references alone."""

    references: list[Tensor]
    policies: list[Tensor]
    remainders: list[Tensor]

    @classmethod
    def drawn(cls, shape: str, dtypes: Dtypes, device: torch.device) -> Weights:
        make = torch.Generator(device).manual_seed(0)

        def tensors(dtype: torch.dtype) -> list[Tensor]:
            sizes = SHAPES[shape].tensors()
            return [torch.randn(size, generator=make, device=device).to(dtype) for size in sizes]

        references = tensors(dtypes.reference)
        return cls(references, tensors(dtypes.policy), _remainders(references))

    def sample(self) -> Weights:
        """Copies of the beginnings of a few tensors."""
        picked = [0, len(self.references) // 2, len(self.references) - 1]
        references = [self.references[i][:64].clone() for i in picked]
        policies = [self.policies[i][:64].clone() for i in picked]
        return Weights(references, policies, _remainders(references))

    @property
    def count(self) -> int:
        return sum(x.numel() for x in self.references)


def _remainders(references: list[Tensor]) -> list[Tensor]:
    if references[0].dtype != torch.bfloat16:
        return []
    return [torch.zeros_like(x, dtype=torch.int16) for x in references]


class Provider(NamedTuple):
    """An update; `extra` is its bytes a parameter beyond one sweep."""

    call: Callable[[Weights], Any]
    extra: int = 0
    mixed: bool = True
    bf16_only: bool = False

    def absent(self, dtypes: Dtypes) -> str | None:
        is_mixed = dtypes.reference != dtypes.policy
        is_wide = dtypes.reference != torch.bfloat16
        if (is_mixed and not self.mixed) or (is_wide and self.bf16_only):
            return "does not take these dtypes"
        return None


def _nearest(w: Weights) -> None:
    multi_tensor_lerp_(w.references, w.policies, ALPHA)


def _stochastic(w: Weights) -> None:
    multi_tensor_lerp_(w.references, w.policies, ALPHA, rounding="stochastic", seed=1)


def _split(w: Weights) -> None:
    multi_tensor_lerp_(w.references, w.policies, ALPHA, remainders=w.remainders)


def _foreach(w: Weights) -> None:
    torch._foreach_lerp_(w.references, w.policies, ALPHA)


def _mul_add(w: Weights) -> None:
    """Two sweeps and two roundings, tensor by tensor."""
    for reference, policy in zip(w.references, w.policies, strict=True):
        reference.mul_(1 - ALPHA).add_(policy, alpha=ALPHA)


PROVIDERS = {
    "fasttr": Provider(_nearest),
    "fasttr, stochastic": Provider(_stochastic, bf16_only=True),
    "fasttr, split": Provider(_split, extra=4, bf16_only=True),
    "torch._foreach_lerp_": Provider(_foreach, mixed=False),
    "mul_, add_ loop": Provider(_mul_add),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", default="llama-3.2-1b,llama-3-8b" if gpu else "10m")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    add_common_arguments(parser, "runs/lerp", seconds=4.0)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for model in args.models.split(","):
        for name in args.cases.split(","):
            facts = {"model": model, "case": name}
            yield facts | measure(model, CASES[name], device, args.seconds)


@torch.no_grad()
def measure(model: str, dtypes: Dtypes, device: torch.device, seconds: float) -> Case:
    """All providers on the parameters of one model."""
    weights = Weights.drawn(model, dtypes, device)
    contenders = {
        name: Contender(
            call=lambda provider=provider: provider.call(weights),
            check=lambda provider=provider: _wrong(provider, weights.sample()),
            absent=provider.absent(dtypes),
        )
        for name, provider in PROVIDERS.items()
    }
    copies = [torch.empty_like(policy) for policy in weights.policies]

    def copy() -> None:
        for target, policy in zip(copies, weights.policies, strict=True):
            target.copy_(policy)

    found = compare(contenders, device, seconds=seconds, yardsticks={COPY: copy})
    copied = 2 * weights.count * weights.policies[0].element_size()
    rate = copied / found.times[COPY].median
    swept = 2 * weights.references[0].element_size() + weights.policies[0].element_size()
    rows = {}
    for name, times in found.times.items():
        moved = copied if name == COPY else weights.count * (swept + PROVIDERS[name].extra)
        rows[name] = bandwidth(times, moved, rate)
    return {
        "parameters": weights.count,
        "tensors": len(weights.references),
        "device": str(device),
        "copy": rows.pop(COPY),
        "providers": rows,
        **found.reasons(),
    }


def bandwidth(times: Times, moved: int, copy_rate: float) -> dict[str, float]:
    """What a time stands for, when `moved` bytes were read and written in it."""
    rate = moved / times.median
    return {
        **times.as_dict(),
        "bytes": moved,
        "gb_per_s": rate / 1e9,
        "share_of_copy": rate / copy_rate,
    }


def _wrong(provider: Provider, sample: Weights) -> str:
    """Empty, or how far it lands from fp64. Two roundings are allowed: the loop has them."""
    before = [reference.double() for reference in sample.references]
    provider.call(sample)
    step = STEP[sample.references[0].dtype]
    for old, got, policy in zip(before, sample.references, sample.policies, strict=True):
        new = policy.double()
        error = (got.double() - (old + ALPHA * (new - old))).abs()
        size = old.abs() + new.abs()
        if not bool((error <= 2 * step * size).all()):
            return f"off by {float((error / size).max()):.1e} of the values' size"
    return ""


COLUMNS = ("update", "ms (p20 to p80)", "GB/s", "share of the copy")


def table(case: Case) -> str:
    rows = [
        [name, spread(row, 1e-3), f"{row['gb_per_s']:.3g}", f"{row['share_of_copy']:.0%}"]
        for name, row in by_median(case["providers"])
    ]
    title = (
        f"{case['model']} ({case['parameters'] / 1e6:,.1f} M parameters in {case['tensors']} "
        f"tensors), {case['case']}; copy {case['copy']['gb_per_s']:.3g} GB/s"
    )
    return titled(title, COLUMNS, rows + reasons(case, len(COLUMNS)))


BENCHMARK = Benchmark(
    name="lerp",
    title="The reference update",
    cases=cases,
    table=table,
    bars=Bars("providers", "share_of_copy", "share of the copy's bandwidth"),
)
