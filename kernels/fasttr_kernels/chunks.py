"""The chunk driver: runs of whole groups go through one buffer of logits, products first, row
functions between.

Which row functions (torch or Triton) follows from the device; `select` is the only place that
knows.

Legend: T scored rows, N completions, G groups, V vocabulary, D hidden size, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import products, rows_torch
from fasttr_kernels.head import Head, RowLogps


class Batch(NamedTuple):
    """What goes through the head: rows by completion, completions by group."""

    hidden: Tensor  # (T, D) in the dtype of the products
    head: Head
    target: Tensor  # (T,) int64
    cu_completions: list[int]  # (N+1,)
    cu_groups: list[int]  # (G+1,)
    chunk_rows: int
    stats: bool


class Chunk(NamedTuple):
    """A run of whole groups. `pieces` are its row ranges: more than one where a single group
    exceeds the chunk."""

    groups: slice
    completions: slice
    rows: slice
    pieces: tuple[slice, ...]


class HeadOutput(NamedTuple):
    """What the rows of a batch gave, in the dtype of the logits. `loss` is 0 where nothing
    weighs."""

    loss: Tensor  # ()
    logp: Tensor  # (N,)
    token_logp: Tensor  # (T,)
    entropy: Tensor | None  # (T,)
    correct: Tensor | None  # (T,)
    mean: Tensor | None  # (T,)


# Returns the loss of some groups and, when asked, its gradient by their sequence log-probs.
Weigh = Callable[[slice, slice, Tensor], tuple[Tensor, Tensor | None]]


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
    """Rows whose fp32 logits take at most 2 GiB on a GPU, 32 MiB on a CPU (there 512 to 1024 rows
    are fastest)."""
    if device.type == "cpu":
        return min(1024, max(64, (1 << 23) // vocab // 64 * 64))
    return min(8192, max(1024, (1 << 29) // vocab // 128 * 128))


class Wanted(NamedTuple):
    """Which gradients a call makes."""

    hidden: bool
    weight: bool
    bias: bool


NO_GRADIENTS = Wanted(hidden=False, weight=False, bias=False)


class Grads:
    """Sums over the rows so far; None where not wanted. `weight` and `bias` are fp32 or fp64."""

    def __init__(self, hidden_TD: Tensor, head: Head, wanted: Wanted, hidden_dtype: torch.dtype):
        device = hidden_TD.device
        wide = products.wide(hidden_TD.dtype)
        vocab = head.weight.shape[0]
        self.wanted = any(wanted)
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if wanted.hidden:
            self.hidden = torch.zeros(hidden_TD.shape, dtype=hidden_dtype, device=device)
        if wanted.weight:
            self.weight = torch.empty(head.weight.shape, dtype=wide, device=device)
        if wanted.bias:
            self.bias = torch.zeros(vocab, dtype=wide, device=device)
        # The first product overwrites dW: no sweep to clear it.
        self._beta = 0.0

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
        if self.weight is not None and not self._beta:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


@torch.no_grad()
def run(batch: Batch, weigh: Weigh | None, grads: Grads) -> HeadOutput:
    """Log-probs of every row; with `weigh` also the loss, and the gradients that `grads` holds.
    Three products a chunk."""
    rows = select(batch.hidden.device)
    chunks = list(plan(batch.cu_completions, batch.cu_groups, batch.chunk_rows))
    work = rows.Workspace(_longest_piece(chunks), batch.head, batch.stats, grads.wanted)
    out = _zeros(batch)
    for chunk in chunks:
        row_logps = _fill_logps(rows, batch, chunk, work, out)
        if weigh is None:
            continue
        loss, weight_n = weigh(chunk.groups, chunk.completions, out.logp[chunk.completions])
        out.loss.add_(loss)
        if weight_n is not None and chunk.pieces:
            weight_C = _spread(weight_n, _offsets(batch, chunk))
            _add_grads(rows, batch, chunk, work, row_logps, weight_C, grads)
    return out._replace(loss=out.loss.to(out.logp.dtype))


def plan(cu_completions: list[int], cu_groups: list[int], chunk_rows: int) -> Iterator[Chunk]:
    """Cut the groups, in order, into the largest runs of whole groups with at most `chunk_rows`
    rows."""
    row_of = [cu_completions[n] for n in cu_groups]
    groups = len(row_of) - 1
    first = 0
    while first < groups:
        last = first + 1
        while last < groups and row_of[last + 1] - row_of[first] <= chunk_rows:
            last += 1
        yield Chunk(
            groups=slice(first, last),
            completions=slice(cu_groups[first], cu_groups[last]),
            rows=slice(row_of[first], row_of[last]),
            pieces=tuple(pieces(row_of[first], row_of[last], chunk_rows)),
        )
        first = last


def pieces(start: int, stop: int, chunk_rows: int) -> Iterator[slice]:
    for row in range(start, stop, chunk_rows):
        yield slice(row, min(row + chunk_rows, stop))


def _longest_piece(chunks: list[Chunk]) -> int:
    return max((piece.stop - piece.start for chunk in chunks for piece in chunk.pieces), default=0)


def _zeros(batch: Batch) -> HeadOutput:
    device = batch.hidden.device
    dtype = products.wide(batch.hidden.dtype)
    T = batch.hidden.shape[0]
    N = len(batch.cu_completions) - 1
    out = HeadOutput(
        loss=torch.zeros((), dtype=torch.float64, device=device),
        logp=torch.zeros(N, dtype=dtype, device=device),
        token_logp=torch.zeros(T, dtype=dtype, device=device),
        entropy=None,
        correct=None,
        mean=None,
    )
    if not batch.stats:
        return out
    return out._replace(
        entropy=torch.zeros_like(out.token_logp),
        correct=torch.zeros_like(out.token_logp, dtype=torch.bool),
        mean=torch.zeros_like(out.token_logp),
    )


def _fill_logps(
    rows: Any, batch: Batch, chunk: Chunk, work: Any, out: HeadOutput
) -> list[RowLogps]:
    """The first product and the first sweep of a chunk: its part of `out`, and what its pieces need
    for their gradients."""
    found: list[RowLogps] = []
    for piece in chunk.pieces:
        row_logps = rows.row_logps(
            batch.hidden[piece], batch.head, batch.target[piece], work, batch.stats
        )
        _keep(out, row_logps, piece)
        found.append(row_logps)
    if chunk.completions.stop > chunk.completions.start:
        out.logp[chunk.completions] = segment_sum(
            out.token_logp[chunk.rows], _offsets(batch, chunk)
        )
    return found


def _keep(out: HeadOutput, row_logps: RowLogps, piece: slice) -> None:
    for whole, part in (
        (out.token_logp, row_logps.logp),
        (out.entropy, row_logps.entropy),
        (out.correct, row_logps.correct),
        (out.mean, row_logps.mean),
    ):
        if whole is not None and part is not None:
            whole[piece] = part


def _add_grads(
    rows: Any,
    batch: Batch,
    chunk: Chunk,
    work: Any,
    row_logps: list[RowLogps],
    weight_C: Tensor,
    grads: Grads,
) -> None:
    """The second sweep of a chunk and the products of its gradients."""
    for piece, logps in zip(chunk.pieces, row_logps, strict=True):
        hidden = batch.hidden[piece]
        if len(row_logps) > 1:
            rows.refill(hidden, batch.head, logps, work)
        weight = weight_C[piece.start - chunk.rows.start : piece.stop - chunk.rows.start]
        dz, factor = rows.logit_grad(logps, batch.head, batch.target[piece], weight, weight, work)
        grads.add(dz, factor, hidden, batch.head.weight, piece)


def _offsets(batch: Batch, chunk: Chunk) -> list[int]:
    """Row offsets of a chunk's completions, from its first row."""
    first, last = chunk.completions.start, chunk.completions.stop
    return [row - chunk.rows.start for row in batch.cu_completions[first : last + 1]]


def segment_sum(value_T: Tensor, cu: list[int]) -> Tensor:
    """Sums of runs of rows, added up in fp64 in a fixed order and rounded once."""
    # A blocking copy would wait for all kernels.
    offsets = torch.tensor(cu).to(value_T.device, non_blocking=True)
    sums = torch.segment_reduce(value_T.double(), "sum", offsets=offsets, initial=0.0)
    return sums.to(value_T.dtype)


def _spread(weight_n: Tensor, cu: list[int]) -> Tensor:
    """The weight of each row's completion."""
    lengths = torch.tensor(cu).diff().to(weight_n.device, non_blocking=True)
    return torch.repeat_interleave(weight_n, lengths, output_size=cu[-1])
