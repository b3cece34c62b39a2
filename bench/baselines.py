"""Log-probs as trainers without packing and fused heads make them: the baselines of `bench step`.

Each takes trees (a prompt with two completions) and gives summed log-probs (N,), row after row,
with gradients.

Legend: B sequences, L the longest, T packed tokens, R scored rows, N completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttr.batch import PackedBatch, Tree
from fasttr.models.gather import gather_rows
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import first_fit_decreasing, pack

Score = Callable[[Any], Tensor]


def padded(model: Any, trees: Sequence[Tree], bf16: bool) -> Tensor:
    """One right-padded batch with an attention mask, logits of every position, log-softmax in
    fp32."""
    sequences = [np.concatenate([t.prompt_ids, c]) for t in trees for c in t.completions]
    starts = [max(len(t.prompt_ids) - 1, 0) for t in trees for _ in t.completions]
    device = next(model.parameters()).device
    longest = max(map(len, sequences))
    ids_BL = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask_BL = torch.zeros(len(sequences), longest, dtype=torch.long)
    scored_BL = torch.zeros(len(sequences), longest - 1)
    for i, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        ids_BL[i, : len(ids)], mask_BL[i, : len(ids)] = torch.from_numpy(ids).long(), 1
        scored_BL[i, start : len(ids) - 1] = 1
    ids_BL, mask_BL, scored_BL = ids_BL.to(device), mask_BL.to(device), scored_BL.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits[:, :-1]
    token = logits.float().log_softmax(-1).gather(2, ids_BL[:, 1:, None])[..., 0]
    return (token * scored_BL).sum(1)


def packed_alone(
    trees: Sequence[Tree], budget: int
) -> Iterator[tuple[PackedBatch, tuple[int, ...]]]:
    """Packs of whole pairs in which every completion has its prompt to itself, and the rows of each
    pack."""
    sizes = [sum(len(t.prompt_ids) + len(c) for c in t.completions) for t in trees]
    for members in first_fit_decreasing(sizes, budget):
        alone = [trees[i]._replace(completions=(c,)) for i in members for c in trees[i].completions]
        yield pack(alone), tuple(trees[i].row for i in members)


def packed_shared(
    trees: Sequence[Tree], budget: int
) -> Iterator[tuple[PackedBatch, tuple[int, ...]]]:
    """Packs of trees: each prompt once."""
    sizes = [len(t.prompt_ids) + sum(map(len, t.completions)) for t in trees]
    for members in first_fit_decreasing(sizes, budget):
        yield pack([trees[i] for i in members]), tuple(trees[i].row for i in members)


def full_head(model: PackedModel, batch: PackedBatch) -> Tensor:
    """Logits of every packed row, as a model's own forward makes them; then the scored rows are
    picked."""
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
        logits_TV = model.model.get_output_embeddings()(model.hidden_states(batch))
    logp_TV = logits_TV.float().log_softmax(-1)
    return _summed(gather_rows(logp_TV, batch.predicting), batch)


def completion_head(model: PackedModel, batch: PackedBatch) -> Tensor:
    """Logits of the scored rows alone, log-softmax in fp32."""
    batch = batch.to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
        hidden_RD = gather_rows(model.hidden_states(batch), batch.predicting)
        logits_RV = model.model.get_output_embeddings()(hidden_RD)
    return _summed(logits_RV.float().log_softmax(-1), batch)


def _summed(logp_RV: Tensor, batch: PackedBatch) -> Tensor:
    token_R = logp_RV.gather(1, batch.target[:, None])[:, 0]
    return torch.stack([part.sum() for part in token_R.split(batch.cu_completions.diff().tolist())])


def dpo_sum(logp_N: Tensor, ref_N: Tensor, beta: float) -> Tensor:
    ratio = logp_N - ref_N
    return -F.logsigmoid(beta * (ratio[::2] - ratio[1::2])).sum()
