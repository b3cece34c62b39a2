"""The chunk driver: runs of whole groups go through one buffer of logits, products first, row
functions between.

Which row functions (torch or Triton) follows from the device; `select` is the only place that
knows.

Legend: T scored rows, N completions, G groups, V vocabulary, D hidden size, C rows of a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import products
from fasttr_kernels import rows as torch_rows
from fasttr_kernels.rows import Head, RowScores

# Returns the loss of some groups and, when asked, its gradient by their sequence log-probs.
Weigh = Callable[[slice, slice, Tensor], tuple[Tensor, Tensor | None]]


def select(device: torch.device) -> Any:
    """The row functions of a device: Triton's on a GPU, torch's elsewhere."""
    if device.type != "cuda":
        return torch_rows
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


class Chunk(NamedTuple):
    """A run of whole groups. `pieces` are its row ranges: more than one where a single group
    exceeds the chunk."""

    groups: slice
    completions: slice
    rows: slice
    pieces: tuple[slice, ...]


def plan(cu_completions: list[int], cu_groups: list[int], chunk_rows: int) -> Iterator[Chunk]:
    """Cut the groups, in order, into the largest runs of whole groups with at most `chunk_rows`
    rows."""
    row_of = [cu_completions[n] for n in cu_groups]
    groups, first = len(row_of) - 1, 0
    while first < groups:
        last = first + 1
        while last < groups and row_of[last + 1] - row_of[first] <= chunk_rows:
            last += 1
        start, stop = row_of[first], row_of[last]
        yield Chunk(
            slice(first, last),
            slice(cu_groups[first], cu_groups[last]),
            slice(start, stop),
            tuple(pieces(start, stop, chunk_rows)),
        )
        first = last


def pieces(start: int, stop: int, chunk_rows: int) -> Iterator[slice]:
    for row in range(start, stop, chunk_rows):
        yield slice(row, min(row + chunk_rows, stop))


class Scores(NamedTuple):
    """Scores of all rows, of the dtype of the logits. `loss` is 0 where nothing weighs."""

    loss: Tensor  # ()
    logp: Tensor  # (N,)
    token_logp: Tensor  # (T,)
    entropy: Tensor | None  # (T,)
    correct: Tensor | None  # (T,)
    mean: Tensor | None  # (T,)


class Grads:
    """Sums over the rows so far; None where not wanted. `weight` and `bias` are fp32 or fp64."""

    def __init__(
        self, hidden_TD: Tensor, head: Head, want: tuple[bool, ...], hidden_dtype: torch.dtype
    ):
        new = functools.partial(
            torch.zeros, dtype=products.wide(hidden_TD.dtype), device=hidden_TD.device
        )
        shape = head.weight.shape
        self.wanted = any(want)
        self.hidden = new(hidden_TD.shape, dtype=hidden_dtype) if want[0] else None
        self.weight = (
            torch.empty(shape, dtype=products.wide(hidden_TD.dtype), device=hidden_TD.device)
            if want[1]
            else None
        )
        self.bias = new(shape[0]) if want[2] else None
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
            rows_CD = (
                hidden_CD if factor_C is None else hidden_CD.to(factor_C.dtype) * factor_C[:, None]
            )
            products.weight_grad(dz_CV, rows_CD, self.weight, self._beta)
            self._beta = 1.0
        if self.bias is not None:
            self.bias.add_(
                dz_CV.sum(0, dtype=self.bias.dtype) if factor_C is None else factor_C @ dz_CV
            )

    def done(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.weight is not None and not self._beta:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def segment_sum(value_T: Tensor, cu: list[int]) -> Tensor:
    """Sums of runs of rows, added up in fp64 in a fixed order and rounded once."""
    offsets = torch.tensor(cu).to(
        value_T.device, non_blocking=True
    )  # a blocking copy waits for all kernels
    return torch.segment_reduce(value_T.double(), "sum", offsets=offsets, initial=0.0).to(
        value_T.dtype
    )


@torch.no_grad()
def run(
    hidden_TD: Tensor,
    head: Head,
    target_T: Tensor,
    cu_completions: list[int],
    cu_groups: list[int],
    weigh: Weigh | None,
    chunk_rows: int,
    stats: bool,
    grads: Grads,
) -> Scores:
    """Score every row; with `weigh` also the loss, and the gradients that `grads` holds. Three
    products a chunk."""
    device, dtype, T = hidden_TD.device, products.wide(hidden_TD.dtype), hidden_TD.shape[0]
    rows = select(device)
    new = functools.partial(torch.zeros, dtype=dtype, device=device)
    out = Scores(
        torch.zeros((), dtype=torch.float64, device=device),
        new(len(cu_completions) - 1),
        new(T),
        new(T) if stats else None,
        new(T, dtype=torch.bool) if stats else None,
        new(T) if stats else None,
    )
    chunks = list(plan(cu_completions, cu_groups, chunk_rows))
    most = max((piece.stop - piece.start for chunk in chunks for piece in chunk.pieces), default=0)
    work = rows.Workspace(most, head, stats, grads.wanted)
    for chunk in chunks:
        scored: list[RowScores] = []
        for piece in chunk.pieces:
            scored.append(rows.score(hidden_TD[piece], head, target_T[piece], work, stats))
            _keep(out, scored[-1], piece)
        some = chunk.completions
        cu = [row - chunk.rows.start for row in cu_completions[some.start : some.stop + 1]]
        if some.stop > some.start:
            out.logp[some] = segment_sum(out.token_logp[chunk.rows], cu)
        if weigh is None:
            continue
        loss, weight_n = weigh(chunk.groups, some, out.logp[some])
        out.loss.add_(loss)
        if weight_n is None or not chunk.pieces:
            continue
        lengths = torch.tensor(cu).diff().to(device, non_blocking=True)
        weight_C = torch.repeat_interleave(weight_n, lengths, output_size=cu[-1])
        for piece, scores in zip(chunk.pieces, scored, strict=True):
            if len(scored) > 1:
                rows.refill(hidden_TD[piece], head, scores, work)
            weight_c = weight_C[piece.start - chunk.rows.start : piece.stop - chunk.rows.start]
            dz, factor = rows.logit_grad(scores, head, target_T[piece], weight_c, weight_c, work)
            grads.add(dz, factor, hidden_TD[piece], head.weight, piece)
    return out._replace(loss=out.loss.to(dtype))


def _keep(out: Scores, scores: RowScores, piece: slice) -> None:
    out.token_logp[piece] = scores.logp
    pairs = ((out.entropy, scores.entropy), (out.correct, scores.correct), (out.mean, scores.mean))
    for whole, part in pairs:
        if whole is not None and part is not None:
            whole[piece] = part
