"""linear_preference_loss: equals its specification, for every head, grouping and chunking."""

from __future__ import annotations

import math

import pytest
import torch
from fasttr_kernels import chunks, linear_preference_loss, products
from fasttr_kernels.preference import linear_preference_loss_ref
from torch import Tensor

from tests.kernels.accuracy import (
    DEVICE,
    HEADS,
    LENGTHS,
    Problem,
    assert_as_good_as_torch,
    assert_equal_to_truth,
)


@pytest.mark.parametrize("head", ["plain", "all of them"])
def test_gradcheck(rows: str, head: str) -> None:
    problem = Problem([2, 1, 3, 1], hidden_size=3, vocab=7, dtype=torch.float64, **HEADS[head])
    assert torch.autograd.gradcheck(
        lambda *leaves: problem.loss(list(leaves)).loss,
        problem.leaves(),
        # Interpreted, every entry of the Jacobian costs milliseconds: one random direction.
        fast_mode=rows == "triton",
    )


@pytest.mark.parametrize("head", HEADS)
def test_error_at_most_twice_that_of_plain_torch(rows: str, head: str) -> None:
    problem = Problem(LENGTHS, **HEADS[head])
    (got, got_grads), (plain, plain_grads), (truth, truth_grads) = (
        problem.ours(stats=True),
        problem.plain(stats=True),
        problem.truth(stats=True),
    )
    for name in ("loss", "logp", "token_logp", "entropy", "logit_mean"):
        triple = (getattr(x, name).detach() for x in (got, plain, truth))
        assert_as_good_as_torch(name, *triple, torch.float32)
    for name, *triple in zip(("dX", "dW", "db"), got_grads, plain_grads, truth_grads, strict=False):
        assert_as_good_as_torch(name, *triple, torch.float32)
    assert torch.equal(got.correct, truth.correct)


@pytest.mark.parametrize("head", HEADS)
def test_fp64_equals_the_specification(rows: str, head: str) -> None:
    assert_equal_to_truth(Problem(LENGTHS, dtype=torch.float64, **HEADS[head]))


def test_bf16_error_at_most_twice_that_of_plain_torch(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the weight is cast in tiles of the vocabulary: here two whole ones and a part."""
    if rows == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter stores fp32 to bf16 by truncation: compiled kernels only")
    monkeypatch.setattr(products, "TILE_V", 128)
    problem = Problem(LENGTHS, vocab=301, hidden_size=64, dtype=torch.bfloat16, bias=True)
    (got, got_grads), (plain, plain_grads), (truth, truth_grads) = (
        problem.ours(),
        problem.plain(),
        problem.truth(),
    )
    assert got.logp.dtype == got.loss.dtype == torch.float32
    for name in ("loss", "logp", "token_logp"):
        triple = (getattr(x, name).detach() for x in (got, plain, truth))
        assert_as_good_as_torch(name, *triple, torch.float32)
    for name, *triple in zip(("dX", "dW", "db"), got_grads, plain_grads, truth_grads, strict=True):
        assert triple[0].dtype == torch.bfloat16
        assert_as_good_as_torch(name, *triple, torch.bfloat16)


@pytest.mark.parametrize(
    ("group", "lengths", "some"),
    [
        (1, [3, 1, 2, 5, 4, 1, 2], 6),
        (2, [3, 1, 2, 5, 4, 1], 8),
        (3, [3, 1, 2, 5, 4, 1], 10),
        (7, [3, 1, 2, 5, 4, 1, 2] * 2, 20),
    ],
    ids=["1", "2", "3", "7"],
)
@pytest.mark.parametrize("cut_as", ["whole", "some groups", "pieces"])
def test_any_grouping_and_chunking_gives_the_same_numbers(
    rows: str, group: int, lengths: list[int], some: int, cut_as: str
) -> None:
    chunk_rows = {"whole": None, "some groups": some, "pieces": 2}[cut_as]
    problem = Problem(
        lengths, group=group, dtype=torch.float64, bias=True, options={"softcap": 4.0}
    )
    cut = list(
        chunks.plan(
            problem.cu_completions.tolist(), problem.cu_groups.tolist(), chunk_rows or 10**6
        )
    )
    assert (len(cut) == 1) == (cut_as == "whole")
    assert any(len(chunk.pieces) > 1 for chunk in cut) == (cut_as == "pieces")
    assert_equal_to_truth(problem, chunk_rows=chunk_rows)


def test_loss_fn_sees_whole_groups_in_order(rows: str) -> None:
    problem, seen = Problem([4] * 12, group=3), []

    def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        assert ref_logp is not None
        n = groups.stop - groups.start
        assert logp.shape == ref_logp.shape == (3 * n,)
        torch.testing.assert_close(
            ref_logp, problem.ref_logp[3 * groups.start : 3 * groups.stop].float()
        )
        seen.append(groups)
        return logp.sum()

    linear_preference_loss(
        problem.hidden,
        problem.weight,
        *problem.arguments()[:3],
        loss_fn,
        ref_logp=problem.ref_logp,
        normalizer=1,
        chunk_rows=24,
    )
    assert seen == [slice(0, 2), slice(2, 4)]


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 12, 3])
def test_scoring_is_bitwise_the_same_with_and_without_gradients(
    rows: str, stats: bool, chunk_rows: int | None
) -> None:
    problem = Problem(LENGTHS, vocab=301, bias=True)
    full = problem.loss(chunk_rows=chunk_rows)
    with torch.no_grad():
        valued = problem.loss(chunk_rows=chunk_rows, stats=stats)
    scored = linear_preference_loss(
        problem.hidden,
        problem.weight,
        *problem.arguments()[:3],
        None,
        ref_logp=None,
        normalizer=1,
        bias=problem.bias_V,
        chunk_rows=chunk_rows,
        stats=stats,
        loss_reads=["log_sum_squares"] if stats else [],
    )
    assert full.loss.requires_grad
    assert not valued.loss.requires_grad
    assert torch.equal(full.loss, valued.loss)
    assert scored.loss == 0
    for other in (valued, scored):
        assert torch.equal(full.logp, other.logp)
        assert torch.equal(full.token_logp, other.token_logp)


def test_repeats_bit_for_bit(rows: str) -> None:
    problem = Problem(LENGTHS, vocab=301)
    first, grads = problem.ours(chunk_rows=12)
    for _ in range(20 if DEVICE.type == "cuda" else 3):
        again, others = problem.ours(chunk_rows=12)
        assert torch.equal(first.logp, again.logp)
        assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def test_policy_equal_to_reference_gives_log_2(rows: str) -> None:
    problem = Problem(LENGTHS)
    ref_logp = problem.loss(stats=True).logp
    out = problem.loss(ref_logp=ref_logp)
    assert torch.equal(out.logp - ref_logp, torch.zeros_like(ref_logp))
    torch.testing.assert_close(out.loss.item(), math.log(2), rtol=1e-7, atol=0)


def test_flat_head_has_known_statistics(rows: str) -> None:
    problem = Problem(LENGTHS, vocab=64)
    with torch.no_grad():
        problem.weight.zero_()
        out = problem.loss(stats=True)
    torch.testing.assert_close(out.token_logp, torch.full_like(out.token_logp, -math.log(64)))
    torch.testing.assert_close(out.entropy, torch.full_like(out.token_logp, math.log(64)))
    assert torch.equal(out.logit_mean, torch.zeros_like(out.token_logp))
    assert torch.equal(out.correct, problem.target == 0), "all logits tie: the first index wins"


def test_argmax_hit_takes_the_first_of_tied_logits(rows: str) -> None:
    weight = torch.tensor([[0.0], [2.0], [1.0], [2.0]], device=DEVICE)
    hidden, target = torch.ones(4, 1, device=DEVICE), torch.tensor([0, 1, 2, 3], device=DEVICE)
    one = torch.tensor([0, 4])
    out = linear_preference_loss(
        hidden,
        weight,
        target,
        one,
        torch.tensor([0, 1]),
        None,
        ref_logp=None,
        normalizer=1,
        stats=True,
    )
    assert out.correct is not None
    assert out.correct.tolist() == [False, True, False, False]


def test_constant_added_to_all_logits_changes_nothing(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64, bias=True)
    before, grads = problem.ours()
    with torch.no_grad():
        problem.bias_V += 64.0
    after, others = problem.ours()
    torch.testing.assert_close(before.loss, after.loss, rtol=1e-13, atol=0)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_extreme_logits(rows: str) -> None:
    problem = Problem(LENGTHS, bias=True)
    with torch.no_grad():
        problem.bias_V[::3] = 1e4
        problem.bias_V[1::3] = -1e4
        problem.bias_V[2] = -math.inf
        problem.target[problem.target == 2] = 5
    (got, got_grads), (plain, plain_grads), (truth, truth_grads) = (
        problem.ours(stats=True),
        problem.plain(stats=True),
        problem.truth(stats=True),
    )
    assert truth.token_logp.min() < -1e4
    for name in ("logp", "token_logp", "entropy"):
        assert_as_good_as_torch(
            name, *(getattr(x, name) for x in (got, plain, truth)), torch.float32
        )
    for name, *triple in zip(("dX", "dW", "db"), got_grads, plain_grads, truth_grads, strict=True):
        assert_as_good_as_torch(name, *triple, torch.float32)
    assert torch.equal(got.correct, truth.correct)


@pytest.mark.parametrize(
    ("lengths", "vocab"), [([1], 1), ([1], 5), ([0, 1], 5), ([0, 0], 5), ([3, 0, 0, 2], 9)], ids=str
)
def test_few_rows_and_completions_without_rows(rows: str, lengths: list[int], vocab: int) -> None:
    problem = Problem(
        lengths, group=1 if len(lengths) == 1 else 2, vocab=vocab, dtype=torch.float64
    )
    out = problem.loss()
    assert all(out.logp[i] == 0 for i, n in enumerate(lengths) if n == 0)
    assert_equal_to_truth(problem)


def test_nothing_to_score_gives_zeros(rows: str) -> None:
    problem = Problem([], bias=True)
    out, grads = problem.ours(stats=True)
    assert out.loss == 0
    assert out.logp.shape == out.token_logp.shape == out.entropy.shape == (0,)
    assert [g.abs().sum().item() for g in grads] == [0.0, 0.0, 0.0]
    assert [g.shape for g in grads] == [x.shape for x in problem.leaves()]


def test_unwritten_memory_never_shows(rows: str, poisoned: None) -> None:
    for chunk_rows in (None, 12, 3):
        problem = Problem(LENGTHS, dtype=torch.float64, bias=True, vocab=41)
        assert_equal_to_truth(problem, chunk_rows=chunk_rows, stats=True)


def test_autocast_makes_bf16_products_and_gradients_of_the_inputs_dtype(rows: str) -> None:
    if rows == "triton" and DEVICE.type == "cpu":
        pytest.skip("the interpreter stores fp32 to bf16 by truncation: compiled kernels only")
    problem = Problem(LENGTHS, vocab=301, hidden_size=64, bias=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (got, got_grads) = problem.ours()
        plain = problem.loss(None, linear_preference_loss_ref)
    plain_grads = torch.autograd.grad(plain.loss, problem.leaves())
    truth, truth_grads = problem.truth()
    assert got.logp.dtype == torch.float32
    assert_as_good_as_torch("logp", got.logp, plain.logp, truth.logp, torch.float32)
    for name, *triple in zip(("dX", "dW", "db"), got_grads, plain_grads, truth_grads, strict=True):
        assert triple[0].dtype == torch.float32
        assert_as_good_as_torch(name, *triple, torch.float32)
    assert (got.logp - problem.loss().logp).abs().max() > 0, "autocast had an effect"


def test_strided_inputs_give_the_same_numbers(rows: str) -> None:
    problem = Problem(LENGTHS, dtype=torch.float64)
    truth, truth_grads = problem.truth()
    wide = torch.randn(sum(LENGTHS), 32, device=DEVICE, dtype=torch.float64)
    wide[:, ::2] = problem.hidden.detach()
    hidden = wide[:, ::2].detach().requires_grad_()
    weight = problem.weight.detach().t().contiguous().t().requires_grad_()
    target = torch.stack([problem.target, problem.target], 1)[:, 0]
    assert not any(x.is_contiguous() for x in (hidden, weight, target))
    out = linear_preference_loss(
        hidden,
        weight,
        target,
        *problem.arguments()[1:],
        ref_logp=problem.ref_logp,
        normalizer=problem.groups,
    )
    torch.testing.assert_close(out.logp, truth.logp, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(out.loss, (hidden, weight)), truth_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_real_vocabulary(rows: str) -> None:
    problem = Problem([2, 1], vocab=151936, hidden_size=4)
    (got, got_grads), (plain, plain_grads), (truth, truth_grads) = (
        problem.ours(),
        problem.plain(),
        problem.truth(),
    )
    assert_as_good_as_torch("logp", got.logp, plain.logp, truth.logp, torch.float32)
    for name, *triple in zip(("dX", "dW"), got_grads, plain_grads, truth_grads, strict=True):
        assert_as_good_as_torch(name, *triple, torch.float32)
