"""How the tokens of a pack reach the model, in each tier.

Legend: T packed tokens, N completions, L tokens of the longest, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fasttr.batch import PackedBatch, Part
from fasttr.packing.tiers import PACKED, SHARED


class Rows(Protocol):
    """What a model is called with for a pack, and its output in the order of the pack."""

    def inputs(self, batch: PackedBatch | Part) -> dict[str, Any]: ...

    def flat(self, output: Tensor, batch: PackedBatch | Part) -> Tensor:
        """(T, D) of what the model made of `inputs`."""
        ...

    def token_weights(self, batch: PackedBatch) -> Tensor:
        """Of the shape of the input ids: how many completions read a token, 0 for padding."""
        ...

    def without_mismatched(self, batch: PackedBatch) -> Tensor:
        """The same of trees (completion, mismatched completion), of which the first counts."""
        ...


class SharedRows:
    """The packed attention. The layout comes with the call; nothing is inferred from position
    ids."""

    def __init__(self, attention_backend: str):
        self.attention_backend = attention_backend

    def inputs(self, batch: PackedBatch | Part) -> dict[str, Any]:
        return {
            "input_ids": batch.input_ids[None],
            "position_ids": batch.position_ids[None],
            "use_cache": False,
            "fasttr_layout": batch.attention,
            "fasttr_backend": self.attention_backend,
        }

    def flat(self, output: Tensor, batch: PackedBatch | Part) -> Tensor:
        return output[0]

    def token_weights(self, batch: PackedBatch) -> Tensor:
        return batch.attention.keys.offsets.diff()[None]

    def without_mismatched(self, batch: PackedBatch) -> Tensor:
        return _in_first_segments(batch)[None]


class PackedRows:
    """The model's own attention: without a mask, transformers parts one row where its position ids
    start anew."""

    def inputs(self, batch: PackedBatch | Part) -> dict[str, Any]:
        return {
            "input_ids": batch.input_ids[None],
            "position_ids": batch.position_ids[None],
            "use_cache": False,
        }

    def flat(self, output: Tensor, batch: PackedBatch | Part) -> Tensor:
        return output[0]

    def token_weights(self, batch: PackedBatch) -> Tensor:
        return batch.attention.keys.offsets.diff()[None]

    def without_mismatched(self, batch: PackedBatch) -> Tensor:
        return _in_first_segments(batch)[None]


class PaddedRows:
    """The model's own attention, for models that carry state from token to token too. Padded on the
    right, where no token of a causal model sees the padding: without a mask."""

    def inputs(self, batch: PackedBatch | Part) -> dict[str, Any]:
        place = _place(batch)
        blank = batch.input_ids.new_zeros(place.rows * place.length)
        ids = blank.index_copy(0, place.of_token, batch.input_ids)
        return {"input_ids": ids.view(place.rows, place.length), "use_cache": False}

    def flat(self, output: Tensor, batch: PackedBatch | Part) -> Tensor:
        return output.flatten(0, 1).index_select(0, _place(batch).of_token)

    def token_weights(self, batch: PackedBatch) -> Tensor:
        place = _place(batch)
        blank = batch.input_ids.new_zeros(place.rows * place.length)
        return blank.index_fill(0, place.of_token, 1).view(place.rows, place.length)

    def without_mismatched(self, batch: PackedBatch) -> Tensor:
        weights = self.token_weights(batch)
        weights[1::2] = 0
        return weights


def _in_first_segments(batch: PackedBatch) -> Tensor:
    """(T,) 1 for tokens of every other segment, from the first: a completion with its prompt."""
    counts = batch.attention.cu_q.diff()
    is_first = 1 - torch.arange(len(counts), device=counts.device) % 2
    return torch.repeat_interleave(is_first, counts, output_size=len(batch.input_ids))


class _Place(NamedTuple):
    rows: int  # N
    length: int  # L
    of_token: Tensor  # (T,) int64, where a token lies among the N L places


def _place(batch: PackedBatch | Part) -> _Place:
    lengths, _ = batch.attention.lengths()
    longest = max(lengths)
    begin = batch.attention.cu_q[:-1].long()
    tokens = len(batch.input_ids)
    counts = batch.attention.cu_q.diff()
    first_place = torch.arange(len(lengths), device=begin.device) * longest - begin
    shift = torch.repeat_interleave(first_place, counts, output_size=tokens)
    return _Place(len(lengths), longest, shift + torch.arange(tokens, device=begin.device))


def rows_of(tier: str, attention_backend: str) -> Rows:
    """The rows of a tier; `attention_backend` is that of shared rows."""
    if tier == SHARED:
        return SharedRows(attention_backend)
    return PackedRows() if tier == PACKED else PaddedRows()
