"""The one shape of fasttr: a prompt with m completions, and a pack of such trees.

A preference pair is m = 2, a row of plain completions m = 1, a rollout group m = k. Nothing below
the loss knows "chosen" and "rejected": they are places among the completions of a tree.

Legend: T packed tokens, S gathered key rows, R predicting rows, N completions, B trees (rows of
data), G groups of trees, m completions of a tree.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Tree(NamedTuple):
    """One tokenised row: a prompt and its completions."""

    row: int  # position in the data set after dropping; the key of every cached log-prob
    prompt_ids: np.ndarray  # (prompt_len,) int32, may be empty
    completions: tuple[np.ndarray, ...]  # m arrays (completion_len,) int32, each at least one token
    weight: float = 1.0  # multiplies the row's loss; the normalizer stays the row count
    label: bool = True  # of an unpaired row: desirable or not
    per_completion: Mapping[str, np.ndarray] = {}  # name -> (m,) numbers that a loss reads
    # (m,) how many of the prompt's first tokens each completion goes without. Given, the tree is
    # taken apart: every completion has a prompt of its own, and none is shared.
    prompt_skips: tuple[int, ...] | None = None


class TreeSource(Protocol):
    """Random access to tokenised rows. Lengths are known for all rows without reading any."""

    prompt_lengths: np.ndarray  # (n,) int32
    completion_lengths: np.ndarray  # (n, m) int32
    prompt_skips: np.ndarray | None  # (n, m) int32, those of the trees, 0 where a prompt is shared
    positions: np.ndarray  # (n,) place of each row in the data set as it was read
    largest_id: int  # of all tokens
    fingerprint: str  # changes when any token, order or option that made them changes

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Tree: ...


def own_prompt_lengths(trees: TreeSource, rows: np.ndarray | Sequence[int]) -> np.ndarray:
    """(len(rows), m) how many tokens of prompt each completion of some rows sees."""
    m = trees.completion_lengths.shape[1]
    lengths = np.repeat(trees.prompt_lengths[rows, None].astype(np.int64), m, axis=1)
    return lengths if trees.prompt_skips is None else lengths - trees.prompt_skips[rows]


class RowGather(NamedTuple):
    """A gather of rows, with its inverse so that the backward sums in a fixed order.

    Source row t is read by the output rows readers[offsets[t] : offsets[t + 1]].
    """

    sources: Tensor  # (S,) int32, the source row of each output row
    offsets: Tensor  # (T + 1,) int32
    readers: Tensor  # (S,) int32


class AttentionLayout(NamedTuple):
    """Which keys each packed query row sees: segments of queries against segments of gathered keys.

    Causal, aligned at their ends. Offsets are explicit; nothing is inferred from position ids. All
    of it is tensors: a compiled layer would be compiled anew for each new number.
    """

    cu_q: Tensor  # (segments + 1,) int32
    cu_k: Tensor  # (segments + 1,) int32
    on_host: Tensor  # (2, segments + 1) int32: both once more, where Python reads them
    keys: RowGather  # packed rows -> key rows

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each segment."""
        queries, keys = self.on_host.diff().tolist()
        return queries, keys


class Part(NamedTuple):
    """Tokens of a pack that go through the layers without the others; T is theirs here."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    attention: AttentionLayout

    def to(self, device: torch.device) -> Part:
        attention = self.attention
        keys = RowGather(*(x.to(device) for x in attention.keys))
        cu_q, cu_k = attention.cu_q.to(device), attention.cu_k.to(device)
        return Part(
            self.input_ids.to(device),
            self.position_ids.to(device),
            attention._replace(cu_q=cu_q, cu_k=cu_k, keys=keys),
        )


class PackedBatch(NamedTuple):
    """Trees laid out in one row of T tokens, with everything that their log-probs need."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64; completions continue from the prompt's length
    attention: AttentionLayout
    predicting: RowGather  # packed rows -> the R rows that predict a completion's tokens
    target: Tensor  # (R,) int64, the tokens that they predict
    cu_completions: Tensor  # (N + 1,) int64 on the host: offsets into the R rows
    cu_groups: Tensor  # (G + 1,) int64 on the host: offsets into the N completions
    cu_rows: tuple[int, ...]  # (G + 1,) the same offsets, into the B trees
    # (2N + 1,) on the host: cu_completions with each completion parted at the length of its tree's
    # shortest one (LD-DPO).
    cu_ld_parts: Tensor
    token_counts: Tensor  # (N,) int64: an empty prompt's unpredicted first token is counted too
    weights: Tensor  # (B,) fp32
    labels: Tensor  # (B,) bool
    per_completion: dict[str, Tensor]  # name -> (N,) fp32, of the trees
    rows: tuple[int, ...]  # (B,) data-set rows
    # Of a pack over the budget: its T tokens in order, then perhaps some that nobody reads.
    parts: tuple[Part, ...] = ()

    def to(self, device: torch.device) -> PackedBatch:
        """Move what the model and the loss read; the offsets stay on the host. To a GPU it is one
        copy, which nothing waits for."""
        attention = self.attention
        alone = {name: getattr(self, name) for name in _ALONE}
        tensors = [
            *alone.values(),
            attention.cu_q,
            attention.cu_k,
            *attention.keys,
            *self.predicting,
            *self.per_completion.values(),
        ]
        if device.type == "cuda" and not self.input_ids.is_cuda:
            buffer = one_buffer(tensors, pinned=True).to(device, non_blocking=True)
            moved = iter(views_of(buffer, tensors))
        else:
            moved = iter([x.to(device) for x in tensors])
        moved_alone: dict[str, Any] = {name: next(moved) for name in alone}
        return self._replace(
            **moved_alone,
            attention=attention._replace(
                cu_q=next(moved), cu_k=next(moved), keys=RowGather(*itertools.islice(moved, 3))
            ),
            predicting=RowGather(*itertools.islice(moved, 3)),
            per_completion={name: next(moved) for name in self.per_completion},
            parts=tuple(part.to(device) for part in self.parts),
        )


# Tensors of a pack that are read on the device and stand alone.
_ALONE = ("input_ids", "position_ids", "target", "token_counts", "weights", "labels")
_ALIGNED = 16  # bytes at which every tensor of a buffer starts


def one_buffer(tensors: Sequence[Tensor], pinned: bool = False) -> Tensor:
    """The bytes of some tensors behind each other, uint8 on the host."""
    starts, size = _starts_and_size(tensors)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for start, x in zip(starts, tensors, strict=True):
        # numpy takes no part in torch's threads: small copies are fastest so.
        content = np.ascontiguousarray(x.numpy()).reshape(-1).view(np.uint8)
        buffer.numpy()[start : start + len(content)] = content
    return buffer


def views_of(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `one_buffer` of these tensors holds, wherever the buffer lies now."""
    starts, _ = _starts_and_size(like)
    return [
        buffer[start : start + x.nbytes].view(x.dtype).view(x.shape)
        for start, x in zip(starts, like, strict=True)
    ]


def _starts_and_size(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in tensors]
    starts = list(itertools.accumulate(sizes, initial=0))
    return starts[:-1], starts[-1]
