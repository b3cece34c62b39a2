"""Micro benchmarks, so that a regression between two commits can be seen:

pytest bench --benchmark-only --benchmark-json after.json
pytest-benchmark compare before.json after.json
"""

from __future__ import annotations

import functools

import pytest
import torch
from fasttr_kernels import linear_preference_loss, multi_tensor_lerp_

from bench.attention import PROVIDERS as ATTENTION
from bench.attention import Heads, Inputs, gather
from bench.head_problem import LEAVES, make_problem
from bench.head_providers import PROVIDERS as HEADS
from bench.head_providers import step as head_step
from bench.layer import Layers
from bench.lengths import make_trees, packed_tokens
from bench.optim import PROVIDERS as OPTIMIZERS
from bench.optim import Optimizer, sizes_of
from bench.shapes import SHAPES, build
from fasttr.packing.layout import first_fit_decreasing, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LEAF = LEAVES["bf16" if DEVICE.type == "cuda" else "fp32"]
TREES = make_trees("hh", 64, 8000)
FEW_TREES = TREES[:4]


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
    problem = make_problem(8000, 256, 1024, inputs=inputs, device=DEVICE, leaf=LEAF)
    attempt = HEADS[head].prepare(problem)
    benchmark(_synchronized(lambda: head_step(attempt, problem)))
    assert bool(torch.isfinite(problem.hidden.grad).all())
    assert float(problem.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("stats", [False, True])
def test_scores_alone(benchmark, stats):
    problem = make_problem(8000, 256, 1024, device=DEVICE, leaf=LEAF)

    def call():
        return linear_preference_loss(
            problem.hidden.detach(),
            problem.weight.detach(),
            problem.target,
            lengths=problem.lengths,
            stats=stats,
        ).logp

    assert bool((benchmark(_synchronized(call)) < 0).all())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_lerp(benchmark, rounding):
    references = [torch.randn(1024, 1024, device=DEVICE).bfloat16() for _ in range(8)]
    policies = [torch.randn(1024, 1024, device=DEVICE) for _ in range(8)]
    between = torch.lerp(references[0].float(), policies[0], 0.6)

    def call():
        multi_tensor_lerp_(references, policies, 0.6, rounding=rounding, seed=0)

    call()
    torch.testing.assert_close(references[0].float(), between, rtol=2**-7, atol=1e-6)
    benchmark(_synchronized(call))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name.startswith("fasttr")])
def test_adamw(benchmark, name):
    if why := OPTIMIZERS[name].absent(DEVICE):
        pytest.skip(why)
    optimizer = Optimizer(OPTIMIZERS[name], sizes_of("10m-layer"), DEVICE)
    assert optimizer.wrong() == ""
    benchmark(_synchronized(optimizer.step))


@functools.cache
def _layers():
    shape = SHAPES["10m"]._replace(vocabulary=64)
    trees = make_trees("hh", 4, shape.vocabulary)
    return Layers(build(shape, DEVICE, layers=1), pack(trees).to(DEVICE), DEVICE, "inductor")


@pytest.mark.parametrize("mode", ["fp32", "compiled"])
def test_layer_forward_and_backward(benchmark, mode):
    layers = _layers()
    assert layers.check("fp32") == ""
    assert layers.check(mode) == ""
    out = benchmark(_synchronized(layers.ready[mode].both))
    assert bool(torch.isfinite(out).all())


def test_attention_forward_and_backward(benchmark):
    inputs = Inputs.of(FEW_TREES, Heads(4, 4, 64), DEVICE, DTYPE)
    name = "fasttr, varlen" if DEVICE.type == "cuda" else "fasttr, segments"
    out, *_ = benchmark(_synchronized(lambda: inputs.both(ATTENTION[name].attend)))
    assert out.shape == inputs.upstream.shape


def test_gather_of_keys_and_values_there_and_back(benchmark):
    inputs = Inputs.of(TREES, Heads(4, 4, 64), DEVICE, DTYPE)
    dk, dv = benchmark(_synchronized(lambda: gather(inputs)))
    # Every row is read once or, where it is a prompt's, by both completions.
    assert dk.shape == inputs.key[0].transpose(0, 1).shape
    assert float(dv.abs().max()) > 0


def test_first_fit_decreasing(benchmark):
    sizes = [packed_tokens(tree) for tree in TREES] * 64
    bins = benchmark(lambda: first_fit_decreasing(sizes, 8192))
    assert sum(map(len, bins)) == len(sizes)


def test_pack(benchmark):
    batch = benchmark(lambda: pack(TREES))
    assert len(batch.rows) == len(TREES)
