"""The loss head, forward and backward: time, share of the bare products, peak memory, and error
against fp64.

    python -m bench head --shapes qwen2.5-0.5b,llama-3-8b --tokens 2048,8192

A head whose loss, log-probs or gradients are further from fp64 than twice eager torch in the same
dtype prints no number. Inputs are flat (random hidden states: entropy near log V) and peaked
(hidden states that lean toward a row of
the weight: 1 to 2 nats, as language models have).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.head_providers import PROVIDERS, Output, Problem, installed, objective
from bench.timing import header, interleaved, load_of, peak_bytes_of

# (vocabulary, hidden size)
SHAPES = {
    "tiny": (500, 64),
    "10m": (8000, 256),
    "qwen2.5-0.5b": (151936, 896),
    "llama-3.2-1b": (128256, 2048),
    "pythia-2.8b": (50304, 2560),
    "llama-3-8b": (128256, 4096),
    "qwen3-8b": (151936, 4096),
}
ENTROPY = 1.5  # nats, of peaked inputs
FLOOR = {torch.float32: 2e-5, torch.bfloat16: 2e-3}  # allowed relative error beside eager's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--shapes", default="llama-3.2-1b,llama-3-8b" if gpu else "10m")
    parser.add_argument("--tokens", default="2048,8192" if gpu else "2048")
    parser.add_argument("--inputs", default="peaked,flat")
    parser.add_argument("--reference", choices=["with", "without", "both"], default="both")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16" if gpu else "float32"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing per case")
    parser.add_argument("--out", type=Path, default=Path("runs/head"))
    parser.add_argument("--cpu", action="store_true")


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "cases": [],
        "environment": header("python -m bench " + " ".join(sys.argv[1:])),
    }
    modes = {"with": [True], "without": [False], "both": [True, False]}[args.reference]
    for shape in args.shapes.split(","):
        for tokens in map(int, args.tokens.split(",")):
            for inputs in args.inputs.split(","):
                for reference in modes:
                    one = case(
                        shape,
                        tokens,
                        inputs,
                        reference,
                        args.providers.split(","),
                        device,
                        getattr(torch, args.dtype),
                        args.seconds,
                    )
                    result["cases"].append(one)
                    (args.out / "head.json").write_text(json.dumps(result, indent=1) + "\n")
                    from bench.tables import head_table

                    print(head_table(one) + "\n", flush=True)
    return result


def case(
    shape: str,
    tokens: int,
    inputs: str,
    reference: bool,
    names: list[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, Any]:
    """All providers on one problem."""
    problem, entropy = make_problem(*SHAPES[shape], tokens, inputs, reference, device, dtype)
    absent = {name: why for name in names if (why := installed(name, device))}
    present = [name for name in names if name not in absent]
    truth = Truth(problem)
    bars = {
        kind: truth.error(kind, _eager(problem, kind))
        for kind in ("preference", "cross_entropy", "kto")
    }
    errors, wrong, peaks = {}, {}, {}
    for name in present:
        provider = PROVIDERS[name]
        try:
            errors[name] = truth.error(provider.objective, _run(provider.call, problem))
            worst = _too_far(errors[name], bars[provider.objective], FLOOR[dtype])
        except Exception as error:  # a peer's own failure is reported as its result
            absent[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            continue
        if worst:
            wrong[name] = worst
        else:
            peaks[name] = peak_bytes_of(lambda call=provider.call: _run(call, problem), device)
    good = [name for name in errors if name not in wrong]
    calls: dict[str, Any] = {
        name: lambda call=PROVIDERS[name].call: _run(call, problem) for name in good
    }
    calls["bare products"] = _products(problem)
    times = interleaved(calls, device, seconds=seconds)
    vocab, dim = problem.weight.shape
    bare = times.pop("bare products")
    flop_per_pass = 2.0 * tokens * vocab * dim
    rows = {}
    for name, t in times.items():
        passes = PROVIDERS[name].passes + (
            reference and PROVIDERS[name].objective != "cross_entropy"
        )
        rows[name] = {
            **t.as_dict(),
            "share_of_bare_products": bare.median / t.median,
            "peak_bytes": peaks[name],
            "objective": PROVIDERS[name].objective,
            "passes": passes,
            "errors": errors[name],
            **load_of(t.median, flops=passes * flop_per_pass),
        }
    return {
        "shape": shape,
        "tokens": tokens,
        "vocabulary": vocab,
        "hidden_size": dim,
        "inputs": inputs,
        "entropy": entropy,
        "reference": reference,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "bare_products": bare.as_dict(),
        "providers": rows,
        "absent": absent,
        "wrong": wrong,
        "eager_errors": bars,
    }


def make_problem(
    vocab: int,
    dim: int,
    tokens: int,
    inputs: str,
    reference: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Problem, float]:
    """A problem and the mean entropy of its softmax, nats."""
    make = torch.Generator(device).manual_seed(tokens + vocab)
    weight = torch.randn(vocab, dim, generator=make, device=device) * dim**-0.5
    toward = torch.randint(vocab, (tokens,), generator=make, device=device)
    noise = torch.randn(tokens, dim, generator=make, device=device)

    def hidden(lean: float) -> Tensor:
        return weight[toward] * lean + noise

    def entropy(lean: float) -> float:
        logp = (hidden(lean)[:256] @ weight.t()).log_softmax(-1)
        return float(-(logp.exp() * logp).sum(-1).mean())

    lean = 0.0
    if inputs == "peaked":
        low, high = 0.0, 100.0
        for _ in range(16):
            lean = (low + high) / 2
            low, high = (lean, high) if entropy(lean) > ENTROPY else (low, lean)
    # What the model predicts, half of the time; something else otherwise.
    other = torch.randint(vocab, (tokens,), generator=make, device=device)
    target = torch.where(torch.rand(tokens, generator=make, device=device) < 0.5, toward, other)
    length = max(1, min(128, tokens // 2))
    completions = tokens // length // 2 * 2
    rows = completions * length
    near = torch.randn(rows, dim, generator=make, device=device) * 0.05
    x = hidden(lean)[:rows]
    found = entropy(lean)
    # Copies: in fp32 .to() gives the tensor itself, and a leaf must not be another's storage.
    return Problem(
        x.to(dtype, copy=True).requires_grad_(),
        weight.to(dtype, copy=True).requires_grad_(),
        target[:rows],
        completions,
        (x + near).to(dtype) if reference else None,
        weight.to(dtype) if reference else None,
    ), found


class Truth:
    """Losses, log-probs and gradients in fp64, a few rows at a time."""

    ROWS = 512

    def __init__(self, problem: Problem):
        self.p = problem
        self.logp_T = self._token_logp(problem.hidden, problem.weight)
        self.ref_N: Tensor | None = None
        if problem.ref_hidden is not None and problem.ref_weight is not None:
            self.ref_N = (
                self._token_logp(problem.ref_hidden, problem.ref_weight)
                .view(problem.completions, -1)
                .sum(1)
            )
        self.logp_N = self.logp_T.view(problem.completions, -1).sum(1)
        self._known: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def _token_logp(self, hidden: Tensor, weight: Tensor) -> Tensor:
        w = weight.double()
        pieces = zip(hidden.split(self.ROWS), self.p.target.split(self.ROWS), strict=True)
        return torch.cat(
            [(h.double() @ w.t()).log_softmax(-1).gather(1, t[:, None])[:, 0] for h, t in pieces]
        )

    def of(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, dX, dW)."""
        if kind not in self._known:
            leaf = self.logp_T.clone().requires_grad_()
            loss = objective(kind, self.p, leaf, self.ref_N)
            (by_token,) = torch.autograd.grad(loss, leaf)
            with torch.no_grad():
                w = self.p.weight.double()
                d_hidden, d_weight = [], torch.zeros_like(w)
                parts = (
                    self.p.hidden.split(self.ROWS),
                    self.p.target.split(self.ROWS),
                    by_token.split(self.ROWS),
                )
                for h, t, by in zip(*parts, strict=True):
                    dz = (h.double() @ w.t()).softmax(-1).neg_()
                    dz.scatter_add_(1, t[:, None], torch.ones_like(dz[:, :1])).mul_(by[:, None])
                    d_hidden.append((dz @ w).float())
                    d_weight.addmm_(dz.t(), h.double())
            self._known[kind] = (loss.detach(), torch.cat(d_hidden), d_weight.float())
        return self._known[kind]

    def error(self, kind: str, found: tuple[Output, Tensor, Tensor]) -> dict[str, float]:
        loss, d_hidden, d_weight = self.of(kind)
        out, got_hidden, got_weight = found
        errors = {
            "loss": abs(float(out.loss) - float(loss)) / max(abs(float(loss)), 1e-3),
            "d_hidden": float((got_hidden.float() - d_hidden).norm() / d_hidden.norm()),
            "d_weight": float((got_weight.float() - d_weight).norm() / d_weight.norm()),
        }
        if out.logp is not None:
            errors["logp_nats"] = float((out.logp.double() - self.logp_N).abs().max())
        return errors


def _too_far(errors: dict[str, float], bars: dict[str, float], floor: float) -> str:
    """Empty, or which errors are beyond twice eager's; NaN is beyond everything."""
    allowed = {
        key: 2 * bars.get(key, 0.0) + floor * (100 if key == "logp_nats" else 1) for key in errors
    }
    return "; ".join(
        f"{key} is off by {errors[key]:.1e}, allowed {allowed[key]:.1e}"
        for key in errors
        if not errors[key] <= allowed[key]
    )


def _run(call: Any, p: Problem) -> tuple[Output, Tensor, Tensor]:
    out = call(p)
    d_hidden, d_weight = torch.autograd.grad(out.loss, (p.hidden, p.weight))
    return (
        Output(out.loss.detach(), None if out.logp is None else out.logp.detach()),
        d_hidden,
        d_weight,
    )


def _eager(p: Problem, kind: str) -> tuple[Output, Tensor, Tensor]:
    from bench.head_providers import eager_logp

    def call(p: Problem) -> Output:
        ref = None
        if p.ref_hidden is not None and p.ref_weight is not None:
            with torch.no_grad():
                ref = (
                    eager_logp(p.ref_hidden, p.ref_weight, p.target).view(p.completions, -1).sum(1)
                )
        logp = eager_logp(p.hidden, p.weight, p.target)
        return Output(objective(kind, p, logp, ref), logp.view(p.completions, -1).sum(1))

    return _run(call, p)


def _products(p: Problem) -> Any:
    """The products alone: Z, dX, dW, and the reference's Z; 2TVD operations each."""
    hidden, weight = p.hidden.detach(), p.weight.detach()
    ref_hidden, ref_weight = (
        p.ref_hidden,
        None if p.ref_weight is None else p.ref_weight.detach().t(),
    )
    z = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    dx, dw = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        if ref_hidden is not None and ref_weight is not None:
            torch.mm(ref_hidden, ref_weight, out=z)
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z, weight, out=dx)
        torch.mm(z.t(), hidden, out=dw)

    return call
