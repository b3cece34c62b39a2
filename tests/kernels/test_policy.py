"""linear_policy_loss against its specification: every kind of head, chunk and completion, both
kinds of row functions, and numerical differentiation."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from fasttr_kernels import chunks, linear_policy_loss, linear_preference_loss, products
from fasttr_kernels.policy import linear_policy_loss_ref

from tests.kernels.accuracy import DEVICE, HEADS, LENGTHS, Problem, assert_as_good_as_torch

WITH_AN_EMPTY_ONE = [5, 1, 0, 3, 8, 6]


def clipped(problem: Problem):
    """A loss with an advantage a completion, old log-probs a token, a clip, and a mean over the
    tokens of each completion: its weight differs from row to row."""
    make = torch.Generator().manual_seed(7)
    rows, N = problem.hidden.shape[0], len(problem.lengths)
    old = torch.randn(rows, generator=make, dtype=torch.float64).to(DEVICE) - 3
    advantage = torch.randn(N, generator=make, dtype=torch.float64).to(DEVICE)
    lengths = torch.tensor(problem.lengths, device=DEVICE)
    of_row = torch.repeat_interleave(torch.arange(N, device=DEVICE), lengths)

    def loss_fn(token_logp, rows, completions):
        n = of_row[rows]
        ratio = (token_logp - old[rows].to(token_logp.dtype)).exp()
        gain = advantage[n].to(token_logp.dtype)
        loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        assert n.min() == completions.start or problem.lengths[completions.start] == 0
        return (loss / lengths[n]).sum() + 0.01 * (token_logp**2).sum()

    return loss_fn


def call(problem, leaves=None, op=linear_policy_loss, **kw):
    hidden, weight, *bias = leaves or problem.leaves()
    options = {**problem.options, **kw}
    return op(
        hidden,
        weight,
        problem.target,
        problem.cu_completions,
        clipped(problem),
        bias=bias[0] if bias else None,
        normalizer=3.0,
        **options,
    )


def with_grads(problem, leaves=None, **kw):
    leaves = leaves or problem.leaves()
    out = call(problem, leaves, **kw)
    return out, torch.autograd.grad(out.loss, leaves)


def assert_equal_to_truth(problem, **kw):
    got, grads = with_grads(problem, **kw)
    truth, wanted = with_grads(problem, problem.in_fp64(), op=linear_policy_loss_ref)
    for a, b in zip((*got[:3], *grads), (*truth[:3], *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_equals_the_specification_in_fp64(rows, head):
    assert_equal_to_truth(Problem(LENGTHS, dtype=torch.float64, **HEADS[head]))


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("lengths", [LENGTHS, WITH_AN_EMPTY_ONE, [9]])
def test_chunks_and_completions_longer_than_one_change_nothing(rows, chunk_rows, lengths):
    assert_equal_to_truth(Problem(lengths, dtype=torch.float64, bias=True), chunk_rows=chunk_rows)


def test_gradients_are_those_of_numerical_differentiation():
    options = {"vocab": 7, "hidden_size": 3, "options": {"softcap": 3.0}}
    problem = Problem([3, 1, 2], dtype=torch.float64, bias=True, **options)
    loss = functools.partial(call, problem)
    assert torch.autograd.gradcheck(lambda *leaves: loss(list(leaves)).loss, problem.leaves())


def test_in_fp32_as_good_as_torch(rows):
    problem = Problem([40, 17, 60], vocab=501, hidden_size=64)
    truth, wanted = with_grads(problem, problem.in_fp64(), op=linear_policy_loss_ref)
    plain, plain_grads = with_grads(problem, op=linear_policy_loss_ref)
    got, grads = with_grads(problem)
    pairs = zip(
        ("loss", "logp", "token_logp", "d_hidden", "d_weight"),
        (*got[:3], *grads),
        (*plain[:3], *plain_grads),
        (*truth[:3], *wanted),
        strict=True,
    )
    for name, ours, theirs, exact in pairs:
        assert_as_good_as_torch(name, ours, theirs, exact, torch.float32)


def test_three_products_a_chunk(rows, monkeypatch):
    made = []
    for name in ("logits", "hidden_grad", "weight_grad"):
        original = getattr(products, name)
        monkeypatch.setattr(
            products, name, lambda *a, f=original, n=name: (made.append(n), f(*a))[1]
        )
    call(Problem(LENGTHS))
    assert made == ["logits", "hidden_grad", "weight_grad"]


def test_a_loss_of_sums_is_the_preference_loss_bit_for_bit(rows):
    """The same gradient, one weight a row: only how it got there differs."""
    problem = Problem(LENGTHS, dtype=torch.float64)
    cu = problem.cu_completions

    def of_sums(logp, ref_logp, groups):
        return (0.3 * logp**2).sum()

    def of_tokens(token_logp, rows, completions):
        spans = cu[completions.start : completions.stop + 1] - rows.start
        sums = [token_logp[a:b].sum() for a, b in itertools.pairwise(spans)]
        return sum(0.3 * s**2 for s in sums)

    arguments = (problem.hidden, problem.weight, problem.target, cu)
    by_sums = linear_preference_loss(*arguments, 1, of_sums)
    by_tokens = linear_policy_loss(*arguments, of_tokens)
    assert torch.equal(by_sums.token_logp, by_tokens.token_logp)
    torch.testing.assert_close(by_sums.loss, by_tokens.loss, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(out.loss, problem.leaves()) for out in (by_sums, by_tokens)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_log_probs_are_the_same_with_and_without_a_loss(rows):
    problem = Problem(LENGTHS)
    with_loss = call(problem, stats=True)
    alone = linear_policy_loss(
        problem.hidden, problem.weight, problem.target, problem.cu_completions
    )
    assert torch.equal(with_loss.token_logp, alone.token_logp)
    assert torch.equal(with_loss.logp, alone.logp)
    assert float(alone.loss) == 0
    entropy = with_loss.entropy
    logits = problem.hidden @ problem.weight.T
    wanted = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy, wanted.detach(), rtol=1e-5, atol=1e-5)


def test_temperature_is_a_scale_of_the_logits():
    problem = Problem(LENGTHS, dtype=torch.float64, options={"logit_scale": 1.4 / 0.7})
    logits = (problem.hidden @ problem.weight.T * 1.4) / 0.7
    token_logp = logits.log_softmax(-1).gather(1, problem.target[:, None])[:, 0]
    torch.testing.assert_close(call(problem).token_logp, token_logp.detach())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"normalizer": 0}, "normalizer"),
        ({"chunk_rows": 0}, "chunk_rows"),
        ({"cu_completions": torch.tensor([0, 3])}, "cu_completions"),
        ({"loss_fn": lambda logp, rows, completions: logp}, "loss_fn"),
        ({"loss_fn": torch.nn.Linear(1, 1)}, "loss_fn"),
    ],
)
def test_what_cannot_be_is_named(change, told):
    problem = Problem(LENGTHS)
    arguments = {
        "cu_completions": problem.cu_completions,
        "loss_fn": clipped(problem),
        **change,
    }
    with pytest.raises(ValueError, match=told):
        linear_policy_loss(problem.hidden, problem.weight, problem.target, **arguments)


def test_chunks_are_whole_completions():
    """So that a mean over a completion's tokens can be taken."""
    problem = Problem(LENGTHS)
    seen = []

    def loss_fn(token_logp, rows, completions):
        seen.append((rows.start, rows.stop, completions.start, completions.stop))
        return token_logp.sum()

    linear_policy_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        problem.cu_completions,
        loss_fn,
        chunk_rows=9,
    )
    cu = problem.cu_completions.tolist()
    assert len(seen) > 1
    assert all(rows == (cu[c], cu[d]) for *rows_, c, d in seen for rows in [tuple(rows_)])
    assert [c for *_, c, _ in seen][1:] == [d for *_, d in seen][:-1]
    assert chunks.TILE_ROWS > 9
