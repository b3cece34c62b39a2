"""Log-probs as trainers without packing and fused heads make them: the baselines of `bench step`.

Each takes trees (a prompt with two completions) and gives summed log-probs (N,), row after row,
with gradients.

Legend: B sequences, L the longest, T packed tokens, R predicting rows, V vocabulary, N completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.lengths import counted_tokens, packed_tokens
from fasttr.batch import PackedBatch, Tree
from fasttr.models.gather import gather_rows
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import first_fit_decreasing, pack
from fasttr.packing.tiers import unshared

Packs = Callable[[Sequence[Tree], int], Iterator[PackedBatch]]
Head = Callable[[PackedModel, PackedBatch], Tensor]


class _Padded(NamedTuple):
    """Completions with their prompts, one a row, right-padded."""

    ids: Tensor  # (B, L)
    mask: Tensor  # (B, L) 1 on tokens
    scored: Tensor  # (B, L - 1) 1 where the next token is a completion's

    @classmethod
    def of(cls, trees: Sequence[Tree], device: torch.device) -> _Padded:
        sequences = []
        starts = []
        for tree in trees:
            for completion in tree.completions:
                sequences.append(np.concatenate([tree.prompt_ids, completion]))
                starts.append(max(len(tree.prompt_ids) - 1, 0))
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        scored = torch.zeros(len(sequences), longest - 1)
        for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
            scored[row, start : len(sequence) - 1] = 1
        return cls(ids.to(device), mask.to(device), scored.to(device))


def padded_logps(model: Any, trees: Sequence[Tree], bf16: bool) -> Tensor:
    """One right-padded batch with an attention mask, logits of every position, log-softmax in
    fp32."""
    batch = _Padded.of(trees, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        out = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    logp_BLV = out.logits[:, :-1].float().log_softmax(-1)
    token_BL = logp_BLV.gather(2, batch.ids[:, 1:, None])[..., 0]
    return (token_BL * batch.scored).sum(1)


def packed_alone(trees: Sequence[Tree], budget: int) -> Iterator[PackedBatch]:
    """Packs of whole pairs in which every completion has its prompt to itself."""
    for members in first_fit_decreasing([counted_tokens([tree]) for tree in trees], budget):
        yield pack([unshared(trees[i]) for i in members])


def packed_shared(trees: Sequence[Tree], budget: int) -> Iterator[PackedBatch]:
    """Packs of trees: each prompt once."""
    for members in first_fit_decreasing([packed_tokens(tree) for tree in trees], budget):
        yield pack([trees[i] for i in members])


def full_head(model: PackedModel, host_batch: PackedBatch) -> Tensor:
    """Logits of every packed row, as a model's own forward makes them; then the predicting rows are
    picked."""
    batch = host_batch.to(model.device)
    with model.autocast():
        logits_TV = model.model.get_output_embeddings()(model.hidden_states(batch))
    logp_TV = logits_TV.float().log_softmax(-1)
    return _summed(gather_rows(logp_TV, batch.predicting), batch)


def completion_head(model: PackedModel, host_batch: PackedBatch) -> Tensor:
    """Logits of the predicting rows alone, log-softmax in fp32."""
    batch = host_batch.to(model.device)
    with model.autocast():
        hidden_RD = gather_rows(model.hidden_states(batch), batch.predicting)
        logits_RV = model.model.get_output_embeddings()(hidden_RD)
    return _summed(logits_RV.float().log_softmax(-1), batch)


def _summed(logp_RV: Tensor, batch: PackedBatch) -> Tensor:
    token_R = logp_RV.gather(1, batch.target[:, None])[:, 0]
    lengths = batch.cu_completions.diff().tolist()
    return torch.stack([part.sum() for part in token_R.split(lengths)])


def dpo_sum(logp_N: Tensor, ref_N: Tensor, beta: float) -> Tensor:
    """Over pairs."""
    ratio = logp_N - ref_N
    return -F.logsigmoid(beta * (ratio[0::2] - ratio[1::2])).sum()
