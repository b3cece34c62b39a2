"""linear_preference_loss in a graph: which gradients are made, how often, and what may surround
it."""

from __future__ import annotations

import pytest
import torch
from fasttr_kernels import linear_preference_loss, products
from fasttr_kernels.preference import linear_preference_loss_ref
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.accuracy import DEVICE, LENGTHS, Problem, assert_equal_to_truth, dpo


def test_duplicate_targets_add_up(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    problem.target.fill_(3)
    assert_equal_to_truth(problem)


def test_tied_weight_gets_both_gradients(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    ids = torch.arange(sum(LENGTHS), device=DEVICE) % problem.vocab

    def tied(op) -> Tensor:
        weight = problem.weight.detach().requires_grad_()
        (grad,) = torch.autograd.grad(problem.loss([weight[ids].tanh(), weight], op).loss, weight)
        return grad

    torch.testing.assert_close(
        tied(linear_preference_loss), tied(linear_preference_loss_ref), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_costs_no_product(
    rows: str, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    _, (d_hidden, d_weight) = problem.truth()
    made = []
    for name in ("hidden_grad", "weight_grad"):
        original = getattr(products, name)
        monkeypatch.setattr(
            products, name, lambda *a, f=original, n=name: (made.append(n), f(*a))[1]
        )
    getattr(problem, frozen).requires_grad_(False)
    free = "weight" if frozen == "hidden" else "hidden"
    (grad,) = torch.autograd.grad(problem.loss().loss, getattr(problem, free))
    torch.testing.assert_close(
        grad, d_weight if free == "weight" else d_hidden, rtol=1e-12, atol=1e-14
    )
    assert made == [f"{free}_grad"]


def test_scores_only_make_one_product_a_chunk(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, made = Problem(LENGTHS), []
    for name in ("logits", "hidden_grad", "weight_grad"):
        original = getattr(products, name)
        monkeypatch.setattr(
            products, name, lambda *a, f=original, n=name: (made.append(n), f(*a))[1]
        )
    with torch.no_grad():
        problem.loss()
    assert made == ["logits"]
    made.clear()
    problem.loss()
    assert made == ["logits", "hidden_grad", "weight_grad"], "three passes"


def test_gradient_of_the_result_scales_the_gradients_and_can_come_twice(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64, bias=True)
    _, truth = problem.truth()
    loss = problem.loss().loss
    for by in (1.0, 3.0, 1.0):
        grads = torch.autograd.grad(loss * by, problem.leaves(), retain_graph=True)
        for a, b in zip(grads, truth, strict=True):
            torch.testing.assert_close(a, by * b, rtol=1e-12, atol=1e-14)


def test_accumulating_backward_leaves_the_sum_in_grad(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    _, truth = problem.truth()
    for _ in range(3):
        problem.loss().loss.backward()
    torch.testing.assert_close(problem.weight.grad, 3 * truth[1], rtol=1e-12, atol=1e-14)


def test_checkpoint_around_the_op_does_not_multiply_calls_of_loss_fn(rows: str) -> None:
    problem, calls = Problem(LENGTHS, dtype=torch.float64), []

    def counted(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        calls.append(groups)
        return dpo(logp, ref_logp, groups)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_preference_loss(
            hidden,
            weight,
            *problem.arguments()[:3],
            counted,
            ref_logp=problem.ref_logp,
            normalizer=problem.groups,
        ).loss

    loss = checkpoint(step, problem.hidden, problem.weight, use_reentrant=False)
    grads = torch.autograd.grad(loss, problem.leaves())
    for a, b in zip(grads, problem.truth()[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert len(calls) == 2, "once in the forward, once in the recomputation"


def test_compiler_breaks_the_graph_once() -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    rest = problem.arguments()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_preference_loss(
            hidden * 2, weight, *rest, ref_logp=problem.ref_logp, normalizer=2
        )
        return out.loss * 3

    found = torch._dynamo.explain(step)(*problem.leaves())
    assert found.graph_break_count == 1
    assert found.graph_count == 2, "what is before it and what is after it"
    compiled = torch.compile(step, backend="aot_eager")
    eager, after = (
        torch.autograd.grad(f(*problem.leaves()), problem.leaves()) for f in (step, compiled)
    )
    for a, b in zip(eager, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="streams are a GPU's")
def test_side_stream_gives_the_same_bits() -> None:
    problem = Problem(LENGTHS, vocab=5003)
    first, grads = problem.ours()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again, others = problem.ours()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(first.logp, again.logp)
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
