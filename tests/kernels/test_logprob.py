"""linear_logprob: equals its specification for any upstream gradient, eager and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from fasttr_kernels import chunks, linear_logprob, products
from fasttr_kernels.logprob import Logprob, linear_logprob_ref
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.accuracy import DEVICE, HEADS, Problem, assert_as_good_as_torch

ROWS = 13
IGNORED = [0, 7, 12]


def make(head: str, dtype: torch.dtype = torch.float32, ignored: list[int] = IGNORED) -> Problem:
    problem = Problem([ROWS], group=1, dtype=dtype, **HEADS[head])
    problem.target[ignored] = -100
    return problem


def call(op, problem: Problem, leaves: list[Tensor] | None = None, **kw) -> Logprob:
    hidden, weight, *bias = leaves or problem.leaves()
    return op(hidden, weight, problem.target, *bias, **problem.options, **kw)


def grads(out: Logprob, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients for upstream gradients that differ by row and between logp and lse."""
    by = torch.linspace(-1, 2, ROWS, dtype=torch.float64, device=DEVICE)
    total = (out.logp.double() * by).sum() + (out.lse.double() * by.square().flip(0)).sum()
    return torch.autograd.grad(total, leaves)


@pytest.fixture(params=[None, 8], ids=["one chunk", "chunks of 8 rows"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(chunks, "default_rows", lambda vocab, device: request.param)


@pytest.mark.parametrize("head", ["plain", "all of them"])
def test_gradcheck(rows: str, head: str) -> None:
    problem = Problem([4], group=1, hidden_size=3, vocab=7, dtype=torch.float64, **HEADS[head])
    problem.target[1] = -100
    assert torch.autograd.gradcheck(
        lambda *leaves: call(linear_logprob, problem, list(leaves))[:2],
        problem.leaves(),
        # Interpreted, every entry of the Jacobian costs milliseconds: one random direction.
        fast_mode=rows == "triton",
    )


@pytest.mark.parametrize("head", HEADS)
def test_error_at_most_twice_that_of_plain_torch(rows: str, chunked: None, head: str) -> None:
    problem = make(head)
    exact = problem.in_fp64()
    got, plain, truth = (
        call(linear_logprob, problem, stats=True, squares=True),
        call(linear_logprob_ref, problem, stats=True, squares=True),
        call(linear_logprob_ref, problem, exact, stats=True, squares=True),
    )
    for name in ("logp", "lse", "entropy", "logit_mean", "log_sum_squares"):
        assert_as_good_as_torch(
            name, *(getattr(x, name).detach() for x in (got, plain, truth)), torch.float32
        )
    every = (grads(got, problem.leaves()), grads(plain, problem.leaves()), grads(truth, exact))
    for name, *triple in zip(("dX", "dW", "db"), *every, strict=False):
        assert_as_good_as_torch(name, *triple, torch.float32)
    assert torch.equal(got.correct, truth.correct)
    assert (got.logp[IGNORED] == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_fp64_equals_the_specification(rows: str, chunked: None, head: str) -> None:
    problem = make(head, torch.float64)
    got, truth = call(linear_logprob, problem), call(linear_logprob_ref, problem)
    pairs = zip(
        (*got[:2], *grads(got, problem.leaves())),
        (*truth[:2], *grads(truth, problem.leaves())),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_all_rows_ignored_leaves_the_gradient_of_lse_alone(rows: str) -> None:
    problem = make("bias", torch.float64, list(range(ROWS)))
    out = call(linear_logprob, problem, stats=True)
    assert (out.logp == 0).all()
    assert not out.correct.any()
    assert all(
        g.abs().max() == 0
        for g in torch.autograd.grad(out.logp.sum(), problem.leaves(), retain_graph=True)
    )
    truth = torch.autograd.grad(call(linear_logprob_ref, problem).lse.sum(), problem.leaves())
    for a, b in zip(torch.autograd.grad(out.lse.sum(), problem.leaves()), truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_id_outside_the_vocabulary_gives_nan_not_a_wrong_number(rows: str) -> None:
    problem = make("plain")
    problem.target[3] = problem.vocab
    out = call(linear_logprob, problem)
    assert out.logp.isnan().nonzero().tolist() == [[3]]
    assert out.lse.isfinite().all()


def test_no_rows(rows: str) -> None:
    hidden = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(9, 4, device=DEVICE, requires_grad=True)
    out = linear_logprob(
        hidden, weight, torch.zeros(0, dtype=torch.int64, device=DEVICE), stats=True, squares=True
    )
    assert [x.shape for x in out] == [(0,)] * 6
    d_hidden, d_weight = torch.autograd.grad(out.logp.sum(), (hidden, weight))
    assert d_hidden.shape == (0, 4)
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_unwritten_memory_never_shows(rows: str, chunked: None, poisoned: None) -> None:
    problem = make("all of them", torch.float64)
    got, truth = (
        call(linear_logprob, problem, stats=True, squares=True),
        call(linear_logprob_ref, problem, stats=True, squares=True),
    )
    for a, b in zip(
        (*got, *grads(got, problem.leaves())),
        (*truth, *grads(truth, problem.leaves())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_side_gets_no_gradient_and_the_other_is_right(rows: str, frozen: str) -> None:
    problem = make("plain", torch.float64)
    truth = grads(call(linear_logprob_ref, problem), problem.leaves())
    getattr(problem, frozen).requires_grad_(False)
    free = problem.weight if frozen == "hidden" else problem.hidden
    out = call(linear_logprob, problem)
    torch.testing.assert_close(
        grads(out, [free])[0], truth[frozen == "hidden"], rtol=1e-12, atol=1e-14
    )


def test_statistics_do_not_change_the_log_probs(rows: str) -> None:
    problem = make("all of them")
    with_stats = call(linear_logprob, problem, stats=True, squares=True)
    without = call(linear_logprob, problem)
    assert without[2:] == (None,) * 4
    assert torch.equal(with_stats.logp, without.logp)
    assert torch.equal(with_stats.lse, without.lse)


def test_flat_head_has_known_values(rows: str) -> None:
    problem = make("plain")
    with torch.no_grad():
        problem.weight.zero_()
    out = call(linear_logprob, problem, stats=True, squares=True)
    log_vocab = torch.full_like(out.lse, math.log(problem.vocab))
    torch.testing.assert_close(out.lse, log_vocab)
    torch.testing.assert_close(out.entropy, log_vocab)
    torch.testing.assert_close(out.log_sum_squares, -log_vocab)
    assert (out.logit_mean == 0).all()


def test_compiles_without_a_graph_break(rows: str) -> None:
    problem = make("all of them", torch.float64)

    def step(*leaves: Tensor) -> Tensor:
        out = call(linear_logprob, problem, [leaves[0] * 2, *leaves[1:]], stats=True)
        return out.logp.sum() + (out.lse * out.entropy).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, after = (
        torch.autograd.grad(f(*problem.leaves()), problem.leaves()) for f in (step, compiled)
    )
    for a, b in zip(eager, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_registered_ops_pass_torchs_own_checks() -> None:
    """Schema, fake tensors, autograd registration and ahead-of-time dispatch, with gradients."""
    problem = make("bias", torch.float64, ignored=[3])
    hidden, weight, bias = problem.leaves()
    options = (-100, 1.0, 2.0)
    forward = (hidden, weight, problem.target, bias, None, *options, True, True, torch.float64)
    torch.library.opcheck(torch.ops.fasttr.linear_logprob.default, forward)
    saved = [x.detach() for x in (hidden, weight, problem.target, bias)]
    with torch.no_grad():
        logp, _, top, total, entropy, *_ = torch.ops.fasttr.linear_logprob(*forward)
    ones = torch.ones_like(logp)
    for d_logp, d_entropy in ((ones, None), (None, ones)):
        upstream = (d_logp, None, d_entropy)
        kept = (*saved, logp, top, total, entropy)
        torch.library.opcheck(
            torch.ops.fasttr.linear_logprob_backward.default,
            (*upstream, *kept, *options, torch.float64, [True, True, True]),
        )


@pytest.mark.parametrize("head", ["plain", "all of them", "peaked"])
def test_entropy_has_a_gradient(rows: str, chunked: None, head: str) -> None:
    """-sum p log p, typed with softmax."""
    problem = make(head, torch.float64)
    by = torch.linspace(-1, 2, ROWS, dtype=torch.float64, device=DEVICE)
    out = call(linear_logprob, problem, stats=True)
    z = problem.hidden @ problem.weight.t()
    z = z if problem.bias_V is None else z + problem.bias_V
    z = z * problem.options.get("logit_scale", 1.0)
    if cap := problem.options.get("softcap"):
        z = cap * (z / cap).tanh()
    p = z.softmax(-1)
    entropy = -(p * z.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(out.entropy, entropy, rtol=1e-11, atol=1e-12)
    assert entropy.std() > 0.01
    leaves = problem.leaves()
    got = torch.autograd.grad((out.entropy * by).sum() + out.logp.sum(), leaves)
    known = problem.target != -100
    logp = z.log_softmax(-1).gather(1, problem.target.clamp(min=0)[:, None])[known]
    want = torch.autograd.grad((entropy * by).sum() + logp.sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_entropy_of_impossible_tokens_has_a_finite_gradient(rows: str) -> None:
    problem = make("bias", torch.float64)
    with torch.no_grad():
        problem.bias_V[::2] = -math.inf
        problem.target[problem.target % 2 == 0] = 1
    out = call(linear_logprob, problem, stats=True)
    (got,) = torch.autograd.grad(out.entropy.sum(), problem.hidden)
    odd = problem.weight[1::2].detach()
    hidden = problem.hidden.detach().requires_grad_()
    p = (hidden @ odd.t() + problem.bias_V[1::2].detach()).softmax(-1)
    (want,) = torch.autograd.grad(-(p * p.log()).sum(), hidden)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def casts(step) -> int:
    """Conversions of a matrix as large as the weight while `step` runs."""
    count = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            if func is torch.ops.aten._to_copy.default and args[0].shape == (301, 64):
                count += 1
            return func(*args, **(kwargs or {}))

    with Count():
        step()
    return count


@pytest.mark.parametrize("op", ["linear_logprob", "linear_preference_loss"])
def test_the_weight_is_cast_once_a_call_and_not_at_all_where_it_is_ready(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The CPU widens a bf16 weight by tiles, which is not what is counted.
    monkeypatch.setattr(products, "TILE_V", 64)
    problem = Problem([5, 6], vocab=301, hidden_size=64)
    ready = problem.weight.detach().bfloat16()
    found = []

    def step(**kw) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            if op == "linear_logprob":
                out = call(linear_logprob, problem, **kw).logp.sum()
            else:
                out = problem.loss(**kw).loss
            found.append(torch.autograd.grad(out, problem.leaves()))

    assert casts(step) == 1
    assert casts(lambda: step(cast_weight=ready)) == 0
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32


def test_autocast_keeps_fp32_sums(rows: str) -> None:
    if rows == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter stores fp32 to bf16 by truncation: compiled kernels only")
    problem = Problem([ROWS], group=1, vocab=301, hidden_size=64, bias=True)
    exact = problem.in_fp64()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, plain = call(linear_logprob, problem), call(linear_logprob_ref, problem)
        got_grads = grads(got, problem.leaves())
    truth = call(linear_logprob_ref, problem, exact)
    assert got.logp.dtype == got_grads[0].dtype == torch.float32
    assert_as_good_as_torch(
        "logp", got.logp.detach(), plain.logp.detach(), truth.logp.detach(), torch.float32
    )
    every = (got_grads, grads(plain, problem.leaves()), grads(truth, exact))
    for name, *triple in zip(("dX", "dW", "db"), *every, strict=True):
        assert_as_good_as_torch(name, *triple, torch.float32)


def test_cannot_be_differentiated_twice(rows: str) -> None:
    problem = make("plain", torch.float64)
    (grad,) = torch.autograd.grad(
        call(linear_logprob, problem).logp.sum(), problem.hidden, create_graph=True
    )
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": torch.zeros(4)}, "hidden"),
        ({"weight": torch.zeros(9, 5)}, "weight"),
        ({"weight": torch.zeros(0, 4)}, "vocabulary"),
        ({"weight": torch.zeros(9, 4).bfloat16()}, "autocast"),
        ({"hidden": torch.zeros(6, 4).half()}, "bfloat16"),
        ({"target": torch.zeros(6)}, "int64"),
        ({"bias": torch.zeros(8)}, "bias"),
        ({"weight": torch.zeros(9, 4, device="meta")}, "device"),
        ({"cast_weight": torch.zeros(9, 4).bfloat16()}, "cast_weight"),
        ({"logit_scale": math.nan}, "logit_scale"),
        ({"softcap": 0.0}, "softcap"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_arguments_are_refused_with_got_wanted_remedy(change: dict, says: str) -> None:
    good = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(9, 4),
        "target": torch.zeros(6).long(),
    }
    linear_logprob(**good)
    with pytest.raises(ValueError, match=says) as error:
        linear_logprob(**{**good, **change})
    assert "got" in str(error.value)
    assert "wanted" in str(error.value)
