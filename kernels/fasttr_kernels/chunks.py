"""The chunk driver: runs of whole groups go through one buffer of logits, products first, row
functions between.

Which row functions (torch or Triton) follows from the device; `select` is the only place that
knows.

Legend: T scored rows, N completions, G groups, V vocabulary, D hidden size, C rows of a chunk, n
completions of a chunk.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import products, rows_torch
from fasttr_kernels.head import Head, RowLogps, Statistics

# Rows of a tile of the products: chunks are cut at its multiples where groups allow.
TILE_ROWS = 128


class Batch(NamedTuple):
    """What goes through the head: rows by completion, completions by group."""

    hidden: Tensor  # (T, D) in the dtype of the products
    head: Head
    target: Tensor  # (T,) int64
    cu_completions: list[int]  # (N+1,)
    cu_groups: list[int]  # (G+1,)
    chunk_rows: int
    statistics: Statistics


class Chunk(NamedTuple):
    """A run of whole groups. `pieces` are its row ranges: more than one where a single group
    exceeds the chunk."""

    groups: slice
    completions: slice
    rows: slice
    pieces: tuple[slice, ...]
    cu: list[int]  # (n+1,) row offsets of the completions, from the chunk's first row


class HeadOutput(NamedTuple):
    """What the rows of a batch gave, in the dtype of the logits. `loss` is 0 where nothing
    weighs."""

    loss: Tensor  # ()
    logp: Tensor  # (N,)
    rows: RowLogps  # (T,)


class Weights(NamedTuple):
    """The loss of a chunk's groups, and its gradient by log-probs: one number a completion, or one
    a row. Both None where no gradient is wanted."""

    loss: Tensor  # ()
    completion: Tensor | None = None  # (n,)
    row: Tensor | None = None  # (C,)


# From a chunk, the log-probs of its completions (n,) and what its rows (C,) gave.
Weigh = Callable[[Chunk, Tensor, RowLogps], Weights]


def select(device: torch.device) -> Any:
    """The row functions of a device: Triton's on a GPU, torch's elsewhere."""
    if device.type != "cuda":
        return rows_torch
    try:
        from fasttr_kernels import rows_triton
    except ImportError as error:
        raise ImportError(
            "CUDA tensors need Triton: pip install 'triton>=3.6,<3.8', or pass CPU tensors"
        ) from error
    return rows_triton


def default_rows(vocab: int, device: torch.device) -> int:
    """Most rows of a chunk: by the memory of a GPU, all of it, so that the answer never changes;
    on a CPU 32 MiB of fp32 logits (there 512 to 1024 rows are fastest)."""
    if device.type == "cuda":
        return rows_of_memory(vocab, torch.cuda.get_device_properties(device).total_memory)
    return min(1024, max(64, (1 << 23) // vocab // 64 * 64))


def rows_of_memory(vocab: int, total_bytes: int) -> int:
    """Rows whose fp32 logits take 1/32 of a GPU's memory, within 1024 and 8192."""
    rows = total_bytes // 32 // (4 * vocab)
    return min(8192, max(1024, rows // TILE_ROWS * TILE_ROWS))


class Wanted(NamedTuple):
    """Which gradients a call makes."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Wanted(hidden=False, weight=False, bias=False)


class Grads:
    """Sums over the rows so far; None where not wanted. `weight` and `bias` are fp32 or fp64.

    With `weight_grad` dW is added to that tensor.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        head: Head,
        wanted: Wanted,
        hidden_dtype: torch.dtype,
        weight_grad: Tensor | None = None,
    ):
        device = hidden_TD.device
        wide = products.wide(hidden_TD.dtype)
        vocab = head.weight.shape[0]
        self.wanted = any(wanted)
        self.hidden: Tensor | None = None
        self.weight = weight_grad
        self.bias: Tensor | None = None
        self._handed_in = weight_grad is not None
        # The first product overwrites a dW that starts here: no sweep to clear it.
        self._beta = 1.0 if self._handed_in else 0.0
        if wanted.hidden:
            self.hidden = torch.zeros(hidden_TD.shape, dtype=hidden_dtype, device=device)
        if wanted.weight and weight_grad is None:
            self.weight = torch.empty(head.weight.shape, dtype=wide, device=device)
        if wanted.bias:
            self.bias = torch.zeros(vocab, dtype=wide, device=device)

    def add(
        self,
        dz_CV: Tensor,
        factor_C: Tensor | None,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        piece: slice,
    ) -> None:
        """The products of the backward for one piece; a row's factor goes to the D-sized side."""
        if self.hidden is not None:
            products.hidden_grad(dz_CV, weight_VD, self.hidden[piece])
            if factor_C is not None:
                self.hidden[piece].mul_(factor_C[:, None])
        if self.weight is not None:
            rows_CD = hidden_CD
            if factor_C is not None:
                rows_CD = hidden_CD.to(factor_C.dtype) * factor_C[:, None]
            products.weight_grad(dz_CV, rows_CD, self.weight, self._beta)
            self._beta = 1.0
        if self.bias is not None and factor_C is not None:
            self.bias.add_(factor_C @ dz_CV)
        elif self.bias is not None:
            self.bias.add_(dz_CV.sum(0, dtype=self.bias.dtype))

    def done(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What autograd is to get: dX, dW, db."""
        if self.weight is not None and not self._beta:
            self.weight.zero_()
        return self.hidden, None if self._handed_in else self.weight, self.bias


@torch.no_grad()
def run(batch: Batch, weigh: Weigh | None, grads: Grads) -> HeadOutput:
    """Log-probs of every row; with `weigh` also the loss, and the gradients that `grads` holds.
    Three products a chunk."""
    rows = select(batch.hidden.device)
    chunks = list(plan(batch.cu_completions, batch.cu_groups, batch.chunk_rows))
    work = _workspace(rows, batch, chunks, grads)
    out = _empty(batch)
    for chunk in chunks:
        _fill_logps(rows, batch, chunk, work, out)
        if weigh is None:
            continue
        weights = weigh(chunk, out.logp[chunk.completions], out.rows.part(chunk.rows))
        out.loss.add_(weights.loss)
        weight_C = weights.row
        if weights.completion is not None and chunk.pieces:
            weight_C = _spread(weights.completion, chunk.cu)
        if weight_C is not None:
            _add_grads(rows, batch, chunk, work, out, weight_C, grads)
    return out._replace(loss=out.loss.to(out.logp.dtype))


def plan(cu_completions: list[int], cu_groups: list[int], chunk_rows: int) -> Iterator[Chunk]:
    """Cut the groups, in order, into as few runs of whole groups of at most `chunk_rows` rows as
    there can be, of about equal size: a small last run would cost a whole sweep over dW."""
    row_of = [cu_completions[n] for n in cu_groups]
    for first, last in _balanced_runs(row_of, chunk_rows):
        completions = slice(cu_groups[first], cu_groups[last])
        rows = slice(row_of[first], row_of[last])
        yield Chunk(
            groups=slice(first, last),
            completions=completions,
            rows=rows,
            pieces=tuple(pieces(rows.start, rows.stop, chunk_rows)),
            cu=[
                row - rows.start for row in cu_completions[completions.start : completions.stop + 1]
            ],
        )


def _balanced_runs(row_of: list[int], chunk_rows: int) -> list[tuple[int, int]]:
    fullest = _runs(row_of, chunk_rows)
    if len(fullest) < 2:
        return fullest
    goal = _tiles(-(-row_of[-1] // len(fullest)))
    while goal < chunk_rows:
        runs = _runs(row_of, goal)
        if len(runs) == len(fullest):
            return runs
        goal += TILE_ROWS
    return fullest


def _runs(row_of: list[int], most: int) -> list[tuple[int, int]]:
    """The longest runs of groups with at most `most` rows each, a longer group alone."""
    runs = []
    first = 0
    while first < len(row_of) - 1:
        last = bisect.bisect_right(row_of, row_of[first] + most) - 1
        last = max(last, first + 1)
        runs.append((first, last))
        first = last
    return runs


def _tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS) * TILE_ROWS


def pieces(start: int, stop: int, chunk_rows: int) -> Iterator[slice]:
    """Rows in as few pieces of at most `chunk_rows` as there can be, of about equal size."""
    if stop == start:
        return
    number = -(-(stop - start) // chunk_rows)
    size = min(chunk_rows, _tiles(-(-(stop - start) // number)))
    for row in range(start, stop, size):
        yield slice(row, min(row + size, stop))


def _workspace(rows: Any, batch: Batch, chunks: list[Chunk], grads: Grads) -> Any:
    longest = max(
        (piece.stop - piece.start for chunk in chunks for piece in chunk.pieces), default=0
    )
    return rows.Workspace(
        longest, batch.chunk_rows, batch.head, batch.statistics.usual, grads.wanted
    )


def _empty(batch: Batch) -> HeadOutput:
    device = batch.hidden.device
    dtype = products.wide(batch.hidden.dtype)
    return HeadOutput(
        loss=torch.zeros((), dtype=torch.float64, device=device),
        logp=torch.zeros(len(batch.cu_completions) - 1, dtype=dtype, device=device),
        rows=RowLogps.empty(device, batch.hidden.shape[0], dtype, batch.statistics),
    )


def _fill_logps(rows: Any, batch: Batch, chunk: Chunk, work: Any, out: HeadOutput) -> None:
    """The first product and the first sweep of a chunk."""
    for piece in chunk.pieces:
        rows.row_logps(
            batch.hidden[piece], batch.head, batch.target[piece], work, out.rows.part(piece)
        )
    if chunk.completions.stop > chunk.completions.start:
        out.logp[chunk.completions] = segment_sum(out.rows.logp[chunk.rows], chunk.cu)


def _add_grads(
    rows: Any,
    batch: Batch,
    chunk: Chunk,
    work: Any,
    out: HeadOutput,
    weight_C: Tensor,
    grads: Grads,
) -> None:
    """The second sweep of a chunk and the products of its gradients."""
    for piece in chunk.pieces:
        hidden = batch.hidden[piece]
        logps = out.rows.part(piece)
        if len(chunk.pieces) > 1:
            rows.refill(hidden, batch.head, logps, work)
        weight = weight_C[piece.start - chunk.rows.start : piece.stop - chunk.rows.start]
        dz, factor = rows.logit_grad(logps, batch.head, batch.target[piece], weight, weight, work)
        grads.add(dz, factor, hidden, batch.head.weight, piece)


def segment_sum(value_T: Tensor, cu: list[int]) -> Tensor:
    """Sums of runs of rows, added up in fp64 in a fixed order and rounded once."""
    # A blocking copy would wait for all kernels.
    offsets = torch.tensor(cu).to(value_T.device, non_blocking=True)
    sums = torch.segment_reduce(value_T.double(), "sum", offsets=offsets, initial=0.0)
    return sums.to(value_T.dtype)


def segment_mean(value_T: Tensor, cu: list[int]) -> Tensor:
    """Means of runs of rows, summed as in `segment_sum`; 0 where a run is empty."""
    offsets = torch.tensor(cu).to(value_T.device, non_blocking=True)
    sums = torch.segment_reduce(value_T.double(), "sum", offsets=offsets, initial=0.0)
    return (sums / offsets.diff().clamp(min=1)).to(value_T.dtype)


def _spread(weight_n: Tensor, cu: list[int]) -> Tensor:
    """The weight of each row's completion."""
    lengths = torch.tensor(cu).diff().to(weight_n.device, non_blocking=True)
    return torch.repeat_interleave(weight_n, lengths, output_size=cu[-1])
