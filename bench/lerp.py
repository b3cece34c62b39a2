"""The reference update: bytes per second, and share of a device-to-device copy, on the tensors of
real models.

    python -m bench lerp --models qwen2.5-0.5b,llama-3-8b

Bytes are counted, not measured: each input read once, each output written once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fasttr_kernels import multi_tensor_lerp_
from torch import Tensor

from bench.timing import Times, header, interleaved

ALPHA = 0.6
BF16_STEP = 2.0**-8  # relative distance of neighbouring bf16 numbers, at most


class Model(NamedTuple):
    """What decides the shapes of a model's parameters."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool

    def shapes(self) -> list[tuple[int, ...]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: list[tuple[int, ...]] = [
            (q, self.hidden),
            (kv, self.hidden),
            (kv, self.hidden),
            (self.hidden, q),
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden,),
            (self.hidden,),
        ]
        head: list[tuple[int, ...]] = [(self.vocabulary, self.hidden)] * (1 if self.tied else 2)
        return head + layer * self.layers + [(self.hidden,)]


MODELS = {
    "tiny": Model(400, 32, 2, 4, 4, 8, 128, False),
    "10m": Model(8000, 256, 8, 4, 4, 64, 704, False),
    "qwen2.5-0.5b": Model(151936, 896, 24, 14, 2, 64, 4864, True),
    "llama-3.2-1b": Model(128256, 2048, 16, 32, 8, 64, 8192, True),
    "llama-3-8b": Model(128256, 4096, 32, 32, 8, 128, 14336, False),
}
CASES = {  # name -> (reference, policy)
    "bf16 <- bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 <- fp32": (torch.bfloat16, torch.float32),
    "fp32 <- fp32": (torch.float32, torch.float32),
}


class Provider(NamedTuple):
    """`call(references, policies, remainders)`; `extra` is its bytes a parameter beyond one
    sweep."""

    call: Callable[[list[Tensor], list[Tensor], list[Tensor]], Any]
    extra: int = 0
    mixed: bool = True
    bf16_only: bool = False


def _mul_add(references: list[Tensor], policies: list[Tensor], _: list[Tensor]) -> None:
    """Two sweeps and two roundings, tensor by tensor."""
    for reference, policy in zip(references, policies, strict=True):
        reference.mul_(1 - ALPHA).add_(policy, alpha=ALPHA)


PROVIDERS = {
    "fasttr": Provider(lambda r, p, _: multi_tensor_lerp_(r, p, ALPHA)),
    "fasttr, stochastic": Provider(
        lambda r, p, _: multi_tensor_lerp_(r, p, ALPHA, rounding="stochastic", seed=1),
        bf16_only=True,
    ),
    "fasttr, split": Provider(
        lambda r, p, low: multi_tensor_lerp_(r, p, ALPHA, remainders=low), extra=4, bf16_only=True
    ),
    "torch._foreach_lerp_": Provider(
        lambda r, p, _: torch._foreach_lerp_(r, p, ALPHA), mixed=False
    ),
    "mul_, add_ loop": Provider(_mul_add),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", default="llama-3.2-1b,llama-3-8b" if torch.cuda.is_available() else "10m"
    )
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per case")
    parser.add_argument("--out", type=Path, default=Path("runs/lerp"))
    parser.add_argument("--cpu", action="store_true")


@torch.no_grad()
def main(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "cases": [],
        "environment": header("python -m bench " + " ".join(sys.argv[1:])),
    }
    for model in args.models.split(","):
        for name in args.cases.split(","):
            one = case(model, name, device, args.seconds)
            result["cases"].append(one)
            (args.out / "lerp.json").write_text(json.dumps(result, indent=1) + "\n")
            from bench.tables import lerp_table

            print(lerp_table(one) + "\n", flush=True)
    return result


def case(model: str, name: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """All providers on the parameters of one model."""
    ref_dtype, policy_dtype = CASES[name]
    shapes = MODELS[model].shapes()
    make = torch.Generator(device).manual_seed(0)

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=make, device=device).to(dtype) for shape in shapes]

    references, policies = tensors(ref_dtype), tensors(policy_dtype)
    lows = (
        [torch.zeros_like(r, dtype=torch.int16) for r in references]
        if ref_dtype == torch.bfloat16
        else []
    )
    count = sum(r.numel() for r in references)
    per_parameter = 2 * references[0].element_size() + policies[0].element_size()
    wrong, absent, calls = {}, {}, {}
    for provider, p in PROVIDERS.items():
        if (ref_dtype != policy_dtype and not p.mixed) or (
            p.bf16_only and ref_dtype != torch.bfloat16
        ):
            absent[provider] = "does not take these dtypes"
        elif worst := _wrong(p, references, policies):
            wrong[provider] = worst
        else:
            calls[provider] = lambda p=p: p.call(references, policies, lows)
    copies = [torch.empty_like(p) for p in policies]
    calls["copy"] = lambda: [c.copy_(p) for c, p in zip(copies, policies, strict=True)]
    times = interleaved(calls, device, seconds=seconds)
    copy_rate = 2 * count * policies[0].element_size() / times["copy"].median
    rows = {
        provider: _row(t, count * (per_parameter + PROVIDERS[provider].extra), copy_rate)
        for provider, t in times.items()
        if provider != "copy"
    }
    return {
        "model": model,
        "case": name,
        "parameters": count,
        "tensors": len(shapes),
        "device": str(device),
        "copy": _row(times["copy"], 2 * count * policies[0].element_size(), copy_rate),
        "providers": rows,
        "absent": absent,
        "wrong": wrong,
    }


def _row(t: Times, moved: int, copy_rate: float) -> dict[str, float]:
    return {
        **t.as_dict(),
        "bytes": moved,
        "gb_per_s": moved / t.median / 1e9,
        "share_of_copy": moved / t.median / copy_rate,
    }


def _wrong(provider: Provider, references: list[Tensor], policies: list[Tensor]) -> str:
    """Empty, or how far a copy of a few tensors lands from fp64. Two roundings are allowed: the
    loop has them."""
    picked = [0, len(references) // 2, len(references) - 1]
    mine = [references[i][:64].clone() for i in picked]
    theirs = [policies[i][:64].clone() for i in picked]
    expected = [
        r.double() + ALPHA * (p.double() - r.double()) for r, p in zip(mine, theirs, strict=True)
    ]
    scale = [r.double().abs() + p.double().abs() for r, p in zip(mine, theirs, strict=True)]
    lows = (
        [torch.zeros_like(r, dtype=torch.int16) for r in mine]
        if mine[0].dtype == torch.bfloat16
        else []
    )
    provider.call(mine, theirs, lows)
    step = BF16_STEP if mine[0].dtype == torch.bfloat16 else 2.0**-22
    for got, want, size in zip(mine, expected, scale, strict=True):
        if not bool(((got.double() - want).abs() <= 2 * step * size).all()):
            worst = float(((got.double() - want).abs() / size).max())
            return f"off by {worst:.1e} of the values' size"
    return ""
