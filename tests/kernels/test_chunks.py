"""How rows are cut into chunks, how large chunks and their buffers are, and weights by row."""

from __future__ import annotations

import random

import pytest
import torch
from fasttr_kernels import chunks, linear_preference_loss, rows_triton
from fasttr_kernels.head import Head, RowLogps, Statistics
from fasttr_kernels.preference import linear_preference_loss_ref
from torch import Tensor

from tests.kernels.accuracy import (
    DEVICE,
    HEADS,
    LENGTHS,
    Problem,
    assert_as_good_as_torch,
)


def offsets(sizes: list[int]) -> list[int]:
    return torch.tensor([0, *sizes]).cumsum(0).tolist()


def greedy(rows_of_groups: list[int], most: int) -> int:
    """The number of chunks that filling each as far as it goes takes: none needs fewer."""
    count, held = 0, most + 1
    for rows in rows_of_groups:
        held += rows
        if held > most:
            count += 1
            held = rows
    return count


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_whole_groups_in_order_and_as_few_as_can_be(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randrange(0, 400) for _ in range(2 * draw.randrange(1, 40))]
    chunk_rows = draw.choice([500, 1024, 4096])
    cut = list(chunks.plan(offsets(lengths), list(range(0, len(lengths) + 1, 2)), chunk_rows))
    pairs = [a + b for a, b in zip(lengths[::2], lengths[1::2], strict=True)]
    assert [g for c in cut for g in range(c.groups.start, c.groups.stop)] == list(range(len(pairs)))
    assert [n for c in cut for n in range(c.completions.start, c.completions.stop)] == list(
        range(len(lengths))
    )
    assert len(cut) == greedy(pairs, chunk_rows)
    for chunk in cut:
        rows = chunk.rows.stop - chunk.rows.start
        assert rows == sum(pairs[chunk.groups])
        assert rows <= max(chunk_rows, pairs[chunk.groups.start])
        assert chunk.cu == offsets(lengths[chunk.completions])
        assert [t for p in chunk.pieces for t in range(p.start, p.stop)] == list(
            range(chunk.rows.start, chunk.rows.stop)
        )


def test_the_last_chunk_is_not_a_small_rest() -> None:
    pairs = [100] * 45  # filled in turn, 4000 rows and 500
    cut = list(chunks.plan(offsets(pairs), list(range(46)), 4096))
    sizes = [c.rows.stop - c.rows.start for c in cut]
    assert greedy(pairs, 4096) == len(sizes) == 2
    assert max(sizes) - min(sizes) <= 128 + 100


def test_groups_that_fill_a_chunk_exactly_share_it() -> None:
    cut = list(chunks.plan(offsets([64, 192] * 4), list(range(0, 9, 2)), 512))
    assert [(c.groups.start, c.groups.stop) for c in cut] == [(0, 2), (2, 4)]


def test_pieces_of_a_long_group_are_of_equal_size_in_whole_tiles() -> None:
    sizes = [p.stop - p.start for p in chunks.pieces(0, 4200, 4096)]
    assert sizes == [2176, 2024]
    assert list(chunks.pieces(5, 5, 4096)) == []
    assert [p.stop - p.start for p in chunks.pieces(3, 11, 3)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("gib", "vocab", "rows"),
    [(139.8, 128256, 8192), (79.1, 128256, 5120), (23.6, 151936, 1280), (11, 256000, 1024)],
)
def test_chunk_size_follows_the_memory_of_the_device(gib: float, vocab: int, rows: int) -> None:
    total = int(gib * 2**30)
    assert chunks.rows_of_memory(vocab, total) == rows
    assert rows == 1024 or 4 * vocab * rows <= total / 32


def test_calls_of_many_sizes_ask_for_few_sizes_of_buffers() -> None:
    head = Head(torch.zeros(40, 4, device=DEVICE), None, 1.0, None)
    rows = [
        rows_triton.Workspace(n, 4000, head, True, True).logits.shape[0] for n in range(1, 4001, 37)
    ]
    assert set(rows) == {*range(512, 4000, 512), 4000}
    assert all(r >= n for r, n in zip(rows, range(1, 4001, 37), strict=True))


def test_rows_of_buffers_start_on_whole_words_at_any_vocabulary() -> None:
    head = Head(torch.zeros(4001, 4, dtype=torch.bfloat16, device=DEVICE), None, 1.0, None)
    work = rows_triton.Workspace(7, 4001, head, True, True)
    assert (work.logits.dtype, work.dz.dtype) == (torch.float32, torch.bfloat16)
    for buffer in (work.logits, work.dz):
        assert buffer.shape[1] == 4001
        assert buffer.stride(0) * buffer.element_size() % 128 == 0


def test_weights_by_row_give_the_gradient_of_a_weighted_sum_of_tokens(rows: str) -> None:
    problem = Problem([5, 1, 0, 3], dtype=torch.float64, bias=True)
    by_row = torch.linspace(-1, 2, 9, dtype=torch.float64, device=DEVICE)
    asked = []

    def weigh(chunk: chunks.Chunk, logp_n: Tensor, rows_C: RowLogps) -> chunks.Weights:
        weight = by_row[chunk.rows]
        asked.append(chunk.rows.stop - chunk.rows.start)
        assert torch.equal(logp_n, chunks.segment_sum(rows_C.logp, chunk.cu))
        return chunks.Weights(loss=(weight * rows_C.logp).sum(), row=weight)

    batch = chunks.Batch(
        hidden=problem.hidden.detach(),
        head=Head.of(problem.weight, problem.bias_V, 1.0, None, torch.float64),
        target=problem.target,
        cu_completions=problem.cu_completions.tolist(),
        cu_groups=problem.cu_groups.tolist(),
        chunk_rows=4,
        statistics=Statistics(),
    )
    grads = chunks.Grads(batch.hidden, batch.head, chunks.Wanted(True, True, True), torch.float64)
    out = chunks.run(batch, weigh, grads)
    assert asked == [6, 3], "two chunks, the first in two pieces"
    z = problem.hidden @ problem.weight.t() + problem.bias_V
    logp = z.log_softmax(-1).gather(1, problem.target[:, None])[:, 0]
    loss = (by_row * logp).sum()
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)
    for got, want in zip(grads.done(), torch.autograd.grad(loss, problem.leaves()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def wpo(logp: Tensor, ref_logp: Tensor | None, groups: slice, means: dict[str, Tensor]) -> Tensor:
    """DPO of pairs, each with WPO's weight."""
    ratio = logp if ref_logp is None else logp - ref_logp
    weight = (means["token_logp"] - means["log_sum_squares"]).exp()
    losses = -torch.nn.functional.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2]))
    return (weight[0::2] * weight[1::2] * losses).sum()


@pytest.mark.parametrize("chunk_rows", [None, 9])
def test_a_loss_reads_means_of_row_statistics(rows: str, chunk_rows: int | None) -> None:
    """WPO's weight is exp(mean_t (log p_t - log sum_v p_v^2)) by completion, a constant: typed
    again here from softmax."""
    problem = Problem([5, 1, 4, 3], dtype=torch.float64, options={"softcap": 4.0})
    reads = {"ref_logp": problem.ref_logp, "normalizer": 2, "softcap": 4.0}
    reads |= {"loss_reads": ("token_logp", "log_sum_squares")}
    leaves = problem.leaves()
    target, cu_completions, cu_groups = problem.arguments()[:3]

    def call(op, **kw):
        return op(*leaves, target, cu_completions, cu_groups, wpo, **reads, **kw)

    out = call(linear_preference_loss, chunk_rows=chunk_rows)
    spec = call(linear_preference_loss_ref)
    z = problem.hidden @ problem.weight.t()
    p = (4 * (z / 4).tanh()).softmax(-1)
    p_target = p.gather(1, target[:, None])[:, 0]
    per_token = (p_target / p.square().sum(-1)).log().detach()
    weight = torch.stack([part.mean() for part in per_token.split([5, 1, 4, 3])]).exp()
    sums = torch.stack([part.sum() for part in p_target.log().split([5, 1, 4, 3])])
    ratio = sums - problem.ref_logp
    pair = weight[0::2] * weight[1::2]
    loss = (pair * -(0.1 * (ratio[0::2] - ratio[1::2])).sigmoid().log()).sum() / 2
    assert pair.std() > 0.1 * pair.mean(), "the weights differ"
    want = torch.autograd.grad(loss, leaves)
    for got in (out, spec):
        torch.testing.assert_close(got.loss, loss, rtol=1e-11, atol=0)
        torch.testing.assert_close(got.log_sum_squares, p.square().sum(-1).log().detach())
        for a, b in zip(torch.autograd.grad(got.loss, leaves), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert out.entropy is None


@pytest.mark.parametrize("head", ["plain", "all of them", "peaked", "odd sizes over a block"])
def test_log_sum_of_squares_errs_at_most_twice_as_plain_torch(rows: str, head: str) -> None:
    problem = Problem(LENGTHS, **HEADS[head])
    target, cu_completions, cu_groups = problem.arguments()[:3]

    def statistic(op, leaves: list[Tensor]) -> Tensor:
        hidden, weight, *bias = leaves
        out = op(
            hidden,
            weight,
            target,
            cu_completions,
            cu_groups,
            None,
            ref_logp=None,
            normalizer=1,
            bias=bias[0] if bias else None,
            loss_reads=["log_sum_squares"],
            **problem.options,
        )
        return out.log_sum_squares

    got = statistic(linear_preference_loss, problem.leaves())
    plain = statistic(linear_preference_loss_ref, problem.leaves())
    truth = statistic(linear_preference_loss_ref, problem.in_fp64())
    assert_as_good_as_torch("log_sum_squares", got, plain, truth, torch.float32)
    assert truth.max() - truth.min() > 0.1
