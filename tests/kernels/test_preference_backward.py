"""linear_preference_loss in a graph: which gradients are made, how often, and what may surround
it."""

from __future__ import annotations

import math

import pytest
import torch
from fasttr_kernels import chunks, linear_logprob, linear_preference_loss, products
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


def test_gradients_in_hand_do_not_change_with_a_later_backward(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    loss = problem.loss().loss
    first = torch.autograd.grad(loss * 2, problem.leaves(), retain_graph=True)
    kept = [g.clone() for g in first]
    torch.autograd.grad(loss * 3, problem.leaves())
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, problem.leaves())


@pytest.mark.parametrize("by", [1.0, 3.0])
def test_the_gradient_of_the_weight_is_handed_on_without_a_copy(
    rows: str, by: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, made = Problem(LENGTHS), []
    done = chunks.Grads.done

    def watched(self: chunks.Grads):
        made.extend((self.hidden.data_ptr(), self.weight.data_ptr()))
        return done(self)

    monkeypatch.setattr(chunks.Grads, "done", watched)
    (problem.loss().loss * by).backward()
    assert [problem.hidden.grad.data_ptr(), problem.weight.grad.data_ptr()] == made
    truth = problem.truth()[1]
    torch.testing.assert_close(problem.weight.grad.double(), by * truth[1], rtol=1e-4, atol=1e-5)


def test_scaling_by_one_writes_nothing(rows: str) -> None:
    x = torch.arange(5000, dtype=torch.float32, device=DEVICE)
    scale_ = chunks.select(DEVICE).scale_
    scale_(x, torch.tensor(0.5, device=DEVICE))
    assert torch.equal(x, 0.5 * torch.arange(5000, device=DEVICE))
    x[3] = math.nan  # would still be NaN, but with other bits if it were multiplied
    bits = x.view(torch.int32).clone()
    bits[3] = 0x7FC12345
    x = bits.view(torch.float32)
    scale_(x, torch.tensor(1.0, device=DEVICE))
    assert x.view(torch.int32)[3] == 0x7FC12345
    assert torch.equal(x.view(torch.int32), bits)
    scale_(x, torch.tensor(math.nan, device=DEVICE))
    assert x.isnan().all()


def test_a_buffer_takes_the_gradient_of_the_weight_inside_the_product(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64, bias=True)
    _, (d_hidden, d_weight, d_bias) = problem.truth()
    buffer = torch.full_like(problem.weight, 0.5).detach()
    betas = []
    original = products.weight_grad
    monkeypatch.setattr(products, "weight_grad", lambda *a: (betas.append(a[3]), original(*a))[1])
    for times in (1, 2):
        problem.hidden.grad = problem.bias_V.grad = None
        problem.loss(weight_grad=buffer, chunk_rows=12).loss.backward()
        torch.testing.assert_close(buffer, 0.5 + times * d_weight, rtol=1e-12, atol=1e-14)
    assert problem.weight.grad is None
    torch.testing.assert_close(problem.hidden.grad, d_hidden, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(problem.bias_V.grad, d_bias, rtol=1e-12, atol=1e-14)
    assert set(betas) == {1.0}
    assert len(betas) > 2, "several chunks"
    with torch.no_grad():
        problem.loss(weight_grad=buffer)
    torch.testing.assert_close(buffer, 0.5 + 2 * d_weight, rtol=1e-12, atol=1e-14)


def test_a_buffer_refuses_what_it_cannot_take_back() -> None:
    problem = Problem(LENGTHS)
    new = lambda: torch.zeros_like(problem.weight)  # noqa: E731
    with pytest.raises(ValueError, match="normalizer"):
        (2 * problem.loss(weight_grad=new()).loss).backward()
    loss = problem.loss(weight_grad=new()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()

    def step(hidden: Tensor) -> Tensor:
        return problem.loss([hidden, problem.weight], weight_grad=new()).loss.sin()

    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint(step, problem.hidden, use_reentrant=False).backward()


def test_a_bf16_leaf_that_wants_fp32_gradients_gets_all_their_digits(rows: str) -> None:
    if rows == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter stores fp32 to bf16 by truncation: compiled kernels only")
    for op in ("loss", "logprob"):
        problem = Problem(LENGTHS, dtype=torch.bfloat16)
        problem.weight.grad_dtype = torch.float32
        if op == "loss":
            problem.loss().loss.backward()
        else:
            linear_logprob(problem.hidden, problem.weight, problem.target).logp.sum().backward()
        grad = problem.weight.grad
        assert grad.dtype == torch.float32
        rounded = grad.bfloat16().float()
        assert ((grad != rounded).float().mean() > 0.5).item()


def test_hooks_of_saved_tensors_see_no_gradients(rows: str) -> None:
    """Hooks that move activations to the host would take dX and dW along."""
    problem, seen = Problem(LENGTHS, bias=True), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (seen.append(x.shape), x)[1], lambda x: x
    ):
        loss = problem.loss().loss
    assert problem.weight.shape not in seen
    assert problem.hidden.shape not in seen
    assert torch.autograd.grad(loss, problem.weight)[0].abs().max() > 0


def test_runs_where_hooks_of_saved_tensors_are_switched_off(rows: str) -> None:
    problem = Problem(LENGTHS, bias=True)
    want = torch.autograd.grad(problem.loss().loss, problem.weight)[0]
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        loss = problem.loss().loss
    assert torch.equal(torch.autograd.grad(loss, problem.weight)[0], want)
    assert want.abs().max() > 0


def test_low_precision_hidden_gradients_are_summed_in_fp32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's product with fp32 output, stood in for by an upcast: no product may have a bf16
    result, whose partial sums may be bf16 too."""
    asked = []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out=None) -> Tensor:
        asked.append(out_dtype or a.dtype)
        full = torch.matmul(a.to(asked[-1]), b.to(asked[-1]))
        return full if out is None else out.copy_(full)

    monkeypatch.setattr(torch, "mm", mm)
    make = torch.Generator().manual_seed(0)
    dz = torch.randn(6, 40, generator=make).bfloat16()
    weight = torch.randn(40, 8, generator=make).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(6, 8, dtype=dtype)
        products.hidden_grad(dz, weight, out)
        assert torch.equal(out, (dz.float() @ weight.float()).to(dtype))
    assert asked == [torch.float32, torch.float32]


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
    assert len(calls) == 1, "the op keeps its gradients itself: nothing of it is recomputed"


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
