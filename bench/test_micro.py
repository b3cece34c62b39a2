"""Micro benchmarks, so that a regression between two commits can be seen:

pytest bench --benchmark-only --benchmark-json after.json
pytest-benchmark compare before.json after.json
"""

from __future__ import annotations

import pytest
import torch
from fasttr_kernels import linear_preference_loss, multi_tensor_lerp_

from bench.head import make_problem
from bench.head_providers import PROVIDERS
from bench.step import make_trees
from fasttr.models.gather import gather_rows
from fasttr.packing.layout import first_fit_decreasing, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TREES = make_trees("hh", 64, 8000)


def _synchronized(call):
    def run():
        out = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    return run


@pytest.mark.parametrize("inputs", ["peaked", "flat"])
@pytest.mark.parametrize("head", ["fasttr", "fasttr linear_logprob"])
def test_head_forward_and_backward(benchmark, head, inputs):
    problem, _ = make_problem(8000, 256, 1024, inputs, False, DEVICE, DTYPE)

    def call():
        loss = PROVIDERS[head].call(problem).loss
        return torch.autograd.grad(loss, (problem.hidden, problem.weight))

    d_hidden, d_weight = benchmark(_synchronized(call))
    assert bool(torch.isfinite(d_hidden).all())
    assert float(d_weight.abs().max()) > 0


@pytest.mark.parametrize("stats", [False, True])
def test_scores_alone(benchmark, stats):
    problem, _ = make_problem(8000, 256, 1024, "peaked", False, DEVICE, DTYPE)
    cu = torch.arange(0, problem.hidden.shape[0] + 1, problem.length)
    groups = torch.arange(0, len(cu), 2)

    def call():
        return linear_preference_loss(
            problem.hidden.detach(),
            problem.weight.detach(),
            problem.target,
            cu,
            groups,
            None,
            ref_logp=None,
            normalizer=1.0,
            stats=stats,
        ).logp

    assert bool((benchmark(_synchronized(call)) < 0).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lerp(benchmark, rounding):
    references = [torch.randn(1024, 1024, device=DEVICE).bfloat16() for _ in range(8)]
    policies = [torch.randn(1024, 1024, device=DEVICE) for _ in range(8)]
    benchmark(
        _synchronized(
            lambda: multi_tensor_lerp_(references, policies, 0.6, rounding=rounding, seed=0)
        )
    )
    assert float((references[0].float() - policies[0]).abs().max()) < 0.1


def test_first_fit_decreasing(benchmark):
    sizes = [len(t.prompt_ids) + sum(map(len, t.completions)) for t in TREES] * 64
    bins = benchmark(lambda: first_fit_decreasing(sizes, 8192))
    assert sum(map(len, bins)) == len(sizes)


def test_pack(benchmark):
    batch = benchmark(lambda: pack(TREES))
    assert len(batch.rows) == len(TREES)


def test_gather_forward_and_backward(benchmark):
    layout = pack(TREES).to(DEVICE).attention
    rows = sum(layout.lengths()[0])
    x = torch.randn(rows, 256, device=DEVICE, requires_grad=True)

    def call():
        out = gather_rows(x, layout.keys)
        return torch.autograd.grad(out, x, torch.ones_like(out))[0]

    assert benchmark(_synchronized(call)).shape == x.shape
