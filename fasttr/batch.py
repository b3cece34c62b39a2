"""The one shape of fasttr: a prompt with m completions, and a pack of such trees.

A preference pair is m = 2, a row of plain completions m = 1, a rollout group m = k. Nothing below
the loss knows "chosen" and "rejected": pairs are index vectors into the N completions of a pack.

Legend: T packed tokens, S gathered key rows, R scored rows, N completions, B trees (rows of data),
G groups of trees.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


def _move(x: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: a copy from pageable memory would be staged."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and not x.is_cuda
        else x.to(device)
    )


class Tree(NamedTuple):
    """One tokenised row: a prompt and its completions."""

    row: int  # position in the data set after dropping; the key of every cached log-prob
    prompt_ids: np.ndarray  # (prompt_len,) int32, may be empty
    completions: tuple[np.ndarray, ...]  # m arrays (completion_len,) int32, each at least one token
    weight: float = 1.0  # multiplies the row's loss; the normalizer stays the row count
    label: bool = True  # of an unpaired row: desirable or not


class TreeSource(Protocol):
    """Random access to tokenised rows. Lengths are known for all rows without reading any."""

    prompt_lengths: np.ndarray  # (n,) int32
    completion_lengths: np.ndarray  # (n, m) int32
    fingerprint: str  # changes when any token, order or option that made them changes

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Tree: ...


class RowGather(NamedTuple):
    """A gather of rows with its inverse, so that the backward sums in a fixed order without
    atomics.

    `sources[j]` is the source row of output row j. Level k of the inverse pairs each source row
    that is read more than k times with its k-th reader; source rows within a level are unique.
    `sources is None` means the identity.
    """

    sources: Tensor | None  # (S,) int64
    levels: tuple[tuple[Tensor, Tensor], ...]  # ((source rows, output rows), ...), int64

    def to(self, device: torch.device) -> RowGather:
        if self.sources is None:
            return self
        levels = tuple((_move(a, device), _move(b, device)) for a, b in self.levels)
        return RowGather(_move(self.sources, device), levels)


class AttentionLayout(NamedTuple):
    """Which keys each packed query row sees: segments of queries against segments of gathered keys,
    causal and aligned at their ends. Offsets are explicit; nothing is inferred from position
    ids."""

    cu_q: Tensor  # (segments + 1,) int32
    cu_k: Tensor  # (segments + 1,) int32
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    keys: RowGather  # packed rows -> key rows

    def to(self, device: torch.device) -> AttentionLayout:
        return self._replace(
            cu_q=_move(self.cu_q, device),
            cu_k=_move(self.cu_k, device),
            keys=self.keys.to(device),
        )


class PackedBatch(NamedTuple):
    """Trees laid out in one row of T tokens, with everything that scoring them needs."""

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64; completions continue from the prompt's length
    attention: AttentionLayout
    scored: RowGather  # packed rows -> the R rows whose next token is scored
    target: Tensor  # (R,) int64
    cu_completions: Tensor  # (N + 1,) int64 on the host: offsets into the R scored rows
    cu_groups: Tensor  # (G + 1,) int64 on the host: offsets into the N completions
    cu_rows: tuple[int, ...]  # (G + 1,) the same offsets, into the B trees
    # (2N + 1,) on the host: each completion cut at the length of its tree's shortest one
    cu_heads: Tensor
    token_counts: (
        Tensor  # (N,) int64: completion tokens, the unscored first one of an empty prompt included
    )
    weights: Tensor  # (B,) fp32
    labels: Tensor  # (B,) bool
    rows: tuple[int, ...]  # (B,) data-set rows
    num_tokens: int  # tokens as an unshared layout would count them: the prompt once per completion

    def to(self, device: torch.device) -> PackedBatch:
        """Move what the model reads; the offsets stay on the host."""
        return self._replace(
            input_ids=_move(self.input_ids, device),
            position_ids=_move(self.position_ids, device),
            attention=self.attention.to(device),
            scored=self.scored.to(device),
            target=_move(self.target, device),
            token_counts=_move(self.token_counts, device),
            weights=_move(self.weights, device),
            labels=_move(self.labels, device),
        )
