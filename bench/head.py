"""The loss head, forward and backward: time, share of the bare products, peak memory, and error
against fp64.

    python -m bench head --shapes qwen2.5-0.5b,llama-3-8b --tokens 2048,8192

A head whose loss, log-probs or gradients are further from fp64 than twice eager torch with the same
leaves prints no number. Completions have unequal lengths and lie pair by pair; heads that want
halves or padding get them laid out before the clock runs. Inputs are flat (random hidden states:
entropy near log V) and peaked (hidden states that lean toward a row of the weight: 1 to 2 nats, as
language models have).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from bench.harness import Bars, Benchmark, Case, Contender, add_common_arguments, compare
from bench.head_problem import LEAVES, Problem, Truth, make_problem, objective
from bench.head_providers import PROVIDERS, Attempt, Output, absent, eager_logp, gradients, step
from bench.shapes import SHAPES
from bench.text import by_median, mib, reasons, spread, titled
from bench.timing import Call, Times, peak_bytes_of

FLOOR = {torch.float32: 2e-5, torch.bfloat16: 2e-3}  # allowed relative error beside eager's
BARE = "bare products"
REFERENCE = {"with": [True], "without": [False], "both": [True, False]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    default = "llama-3.2-1b,llama-3-8b" if gpu else "10m"
    parser.add_argument("--shapes", default=default, help="models' names, or 8192x256 and the like")
    parser.add_argument("--tokens", default="2048,8192" if gpu else "2048")
    parser.add_argument("--inputs", default="peaked,flat")
    parser.add_argument("--reference", choices=REFERENCE, default="both")
    parser.add_argument("--providers", default=",".join(PROVIDERS))
    parser.add_argument(
        "--leaves",
        default="bf16,fp32-autocast-later" if gpu else "fp32",
        help=f"what gradients arrive at, of {', '.join(LEAVES)}; later: a micro-batch after others",
    )
    add_common_arguments(parser, "runs/head", seconds=6.0)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    grid = itertools.product(
        args.shapes.split(","),
        map(int, args.tokens.split(",")),
        args.inputs.split(","),
        REFERENCE[args.reference],
        args.leaves.split(","),
    )
    for shape, tokens, inputs, reference, leaf in grid:
        build = partial(
            make_problem,
            *sizes_of(shape),
            tokens,
            inputs=inputs,
            reference=reference,
            device=device,
            leaf=LEAVES[leaf],
        )
        facts = {"shape": shape, "inputs": inputs, "leaf": leaf}
        # The problem is made in the call, so that one case's memory is free for the next.
        yield facts | measure(build(), args.providers.split(","), args.seconds)


def sizes_of(shape: str) -> tuple[int, int]:
    """Vocabulary and hidden size, of a model's name or from `8192x256`."""
    if shape in SHAPES:
        return SHAPES[shape].vocabulary, SHAPES[shape].hidden
    vocabulary, _, hidden = shape.partition("x")
    return int(vocabulary), int(hidden)


def measure(problem: Problem, names: list[str], seconds: float) -> Case:
    """All providers on one problem."""
    device = problem.hidden.device
    truth = Truth(problem)
    heads = _Heads(problem, truth)
    contenders = {
        name: Contender(
            call=lambda name=name: heads.run(name),
            check=lambda name=name: heads.check(name),
            absent=absent(name, device, problem.leaf),
        )
        for name in names
    }
    bare = bare_products(problem, truth)
    found = compare(contenders, device, seconds=seconds, yardsticks={BARE: bare})
    bare_time = found.times.pop(BARE)
    rows = {name: heads.row(name, times, bare_time) for name, times in found.times.items()}
    vocabulary, dim = problem.weight.shape
    return {
        "tokens": len(problem.hidden),
        "completions": len(problem.lengths),
        "longest": max(problem.lengths),
        "vocabulary": vocabulary,
        "hidden_size": dim,
        "entropy": problem.entropy,
        "reference": problem.ref_hidden is not None,
        "dtype": str(problem.leaf.compute).removeprefix("torch."),
        "device": str(device),
        "bare_products": bare_time.as_dict(),
        "providers": rows,
        "eager_errors": heads.bars,
        **found.reasons(),
    }


class _Heads:
    """The providers on one problem: each held to fp64, by what eager torch reaches."""

    def __init__(self, problem: Problem, truth: Truth):
        self.problem = problem
        self.truth = truth
        self.attempts: dict[str, Attempt] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.peaks: dict[str, int] = {}
        self.bars = {
            kind: truth.error(kind, gradients(self._eager(kind), problem))
            for kind in ("preference", "cross_entropy", "kto")
        }

    def run(self, name: str) -> Output:
        return step(self.attempts[name], self.problem)

    def check(self, name: str) -> str:
        kind = PROVIDERS[name].objective
        self.attempts[name] = PROVIDERS[name].prepare(self.problem)
        found = gradients(self.attempts[name], self.problem)
        self.errors[name] = self.truth.error(kind, found)
        self.peaks[name] = peak_bytes_of(lambda: self.run(name), self.problem.hidden.device)
        return too_far(self.errors[name], self.bars[kind], FLOOR[self.problem.leaf.compute])

    def row(self, name: str, times: Times, bare: Times) -> dict[str, Any]:
        provider = PROVIDERS[name]
        has_reference = self.problem.ref_hidden is not None
        scores_reference = has_reference and provider.objective != "cross_entropy"
        passes = provider.passes + scores_reference
        vocabulary, dim = self.problem.weight.shape
        operations = passes * 2.0 * len(self.problem.hidden) * vocabulary * dim
        return {
            **times.as_dict(),
            "share_of_bare_products": bare.median / times.median,
            "peak_bytes": self.peaks[name],
            "objective": provider.objective,
            "passes": passes,
            "errors": self.errors[name],
            "tflops": operations / times.median / 1e12,
        }

    def _eager(self, kind: str) -> Attempt:
        p = self.problem

        def forward() -> Output:
            ref_N = None
            if p.ref_hidden is not None and p.ref_weight is not None:
                with torch.no_grad():
                    ref_N = p.summed(eager_logp(p.ref_hidden, p.ref_weight, p.target))
            logp_T = eager_logp(p.hidden, p.weight, p.target)
            return Output(objective(kind, p, logp_T, ref_N), p.summed(logp_T))

        return Attempt(forward, p.hidden)


def too_far(errors: Mapping[str, float], bars: Mapping[str, float], floor: float) -> str:
    """Empty, or which errors are beyond twice eager's; NaN is beyond everything."""
    found = []
    for key, error in errors.items():
        # A sum over a completion collects the rounding of its tokens.
        allowed = 2 * bars.get(key, 0.0) + floor * (100 if key == "logp_nats" else 1)
        if not error <= allowed:
            found.append(f"{key} is off by {error:.1e}, allowed {allowed:.1e}")
    return "; ".join(found)


def bare_products(p: Problem, truth: Truth) -> Call:
    """The products alone, 2TVD operations each: Z, dX, dW, and the reference's Z.

    dX and dW get the real dZ: most of it is near 0, and how fast a GPU multiplies depends on the
    numbers.
    """
    dtype = p.leaf.compute
    hidden, weight = p.hidden.detach().to(dtype), p.weight.detach().to(dtype)
    ref_hidden = None if p.ref_hidden is None else p.ref_hidden.to(dtype)
    ref_weight = None if p.ref_weight is None else p.ref_weight.to(dtype)
    dz = truth.logit_gradient("preference", dtype)
    z = torch.empty_like(dz)
    dx, dw = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        if ref_hidden is not None and ref_weight is not None:
            torch.mm(ref_hidden, ref_weight.t(), out=z)
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(dz, weight, out=dx)
        torch.mm(dz.t(), hidden, out=dw)

    return call


COLUMNS = (
    "head",
    "ms (p20 to p80)",
    "share of bare products",
    "TFLOP/s",
    "peak MiB",
    "logp, nats",
    "dX",
    "dW",
)


def table(case: Case) -> str:
    rows = []
    for name, row in by_median(case["providers"]):
        errors = row["errors"]
        kind = row["objective"].replace("_", " ")
        rows.append(
            [
                name if kind == "preference" else f"{name} ({kind})",
                spread(row, 1e-3),
                f"{row['share_of_bare_products']:.0%}",
                f"{row['tflops']:.3g}",
                mib(row["peak_bytes"]),
                f"{errors['logp_nats']:.1e}" if "logp_nats" in errors else "",
                f"{errors['d_hidden']:.1e}",
                f"{errors['d_weight']:.1e}",
            ]
        )
    return titled(_title(case), COLUMNS, rows + reasons(case, len(COLUMNS)))


def _title(case: Case) -> str:
    reference = "with" if case["reference"] else "without"
    completions = ""
    if "completions" in case:
        completions = f" in {case['completions']} completions of up to {case['longest']}"
    return (
        f"{case['shape']} ({case['vocabulary']} x {case['hidden_size']}), {case['tokens']} "
        f"tokens{completions}, {case['inputs']} ({case['entropy']:.1f} nats), "
        f"{case.get('leaf', case['dtype'])}, {reference} the reference; bare products "
        f"{spread(case['bare_products'], 1e-3)} ms"
    )


BENCHMARK = Benchmark(
    name="head",
    title="The loss head",
    cases=cases,
    table=table,
    bars=Bars("providers", "share_of_bare_products", "share of the bare products"),
)
