"""The one shape of fasttr: a prompt with m completions, and a pack of such trees.

A preference pair is m = 2, a row of plain completions m = 1, a rollout group m = k. Nothing below
the loss knows "chosen" and "rejected": they are places among the completions of a tree.

Legend: T packed tokens, S gathered key rows, R predicting rows, N completions, B trees (rows of
data), G groups of trees, m completions of a tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

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

    def to(self, device: torch.device) -> RowGather:
        return RowGather(*(_to(x, device) for x in self))


class AttentionLayout(NamedTuple):
    """Which keys each packed query row sees: segments of queries against segments of gathered keys.

    Causal, aligned at their ends. Offsets are explicit; nothing is inferred from position ids. All
    of it is tensors: a compiled layer would be compiled anew for each new number.
    """

    cu_q: Tensor  # (segments + 1,) int32
    cu_k: Tensor  # (segments + 1,) int32
    on_host: Tensor  # (2, segments + 1) int32: both once more, where Python reads them
    keys: RowGather  # packed rows -> key rows

    def to(self, device: torch.device) -> AttentionLayout:
        return self._replace(
            cu_q=_to(self.cu_q, device),
            cu_k=_to(self.cu_k, device),
            keys=self.keys.to(device),
        )

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each segment."""
        queries, keys = self.on_host.diff().tolist()
        return queries, keys


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

    def to(self, device: torch.device) -> PackedBatch:
        """Move what the model and the loss read; the offsets stay on the host."""
        return self._replace(
            input_ids=_to(self.input_ids, device),
            position_ids=_to(self.position_ids, device),
            attention=self.attention.to(device),
            predicting=self.predicting.to(device),
            target=_to(self.target, device),
            token_counts=_to(self.token_counts, device),
            weights=_to(self.weights, device),
            labels=_to(self.labels, device),
            per_completion={name: _to(x, device) for name, x in self.per_completion.items()},
        )


def _to(x: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from pageable memory would be staged."""
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
