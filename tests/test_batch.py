"""A pack on its way to a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttr import batch as batches
from fasttr.batch import one_buffer
from fasttr.packing.layout import pack
from tests.tiny import random_trees

CUDA = torch.device("cuda", 0)
STAYS = {"cu_completions", "cu_groups", "cu_rows", "cu_ld_parts", "rows", "num_tokens"}


class OnItsWay:
    """A buffer that notes how it is moved, and stays where it is."""

    def __init__(self, content: Tensor, is_pinned: bool, moves: list[Any]):
        self.content, self.is_pinned, self.moves = content, is_pinned, moves

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        self.moves.append((device, self.is_pinned, non_blocking))
        return self.content.clone()


def test_a_pack_moves_in_one_copy_without_a_wait_and_its_offsets_stay(
    monkeypatch: pytest.MonkeyPatch,
):
    moves: list[Any] = []
    monkeypatch.setattr(
        batches,
        "one_buffer",
        lambda tensors, pinned: OnItsWay(one_buffer(tensors), pinned, moves),
    )
    on_host = pack(random_trees([(2, 3, 1)]))._replace(
        per_completion={"margin": torch.tensor([1.5, -2.0])}
    )
    moved = on_host.to(CUDA)
    assert moves == [(CUDA, True, True)]
    storages = set()
    for got, want in zip(tensors_of(moved), tensors_of(on_host), strict=True):
        assert got is not want
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
        storages.add(got.untyped_storage().data_ptr())
    assert len(storages) == 1
    for name in STAYS & set(on_host._fields):
        assert getattr(moved, name) is getattr(on_host, name), name
    assert moved.attention.on_host is on_host.attention.on_host


def tensors_of(batch: batches.PackedBatch) -> list[Tensor]:
    """All that is read on the device."""
    layout = batch.attention
    alone = [
        x
        for name, x in batch._asdict().items()
        if name not in STAYS and isinstance(x, Tensor | np.ndarray)
    ]
    found = [*alone, layout.cu_q, layout.cu_k, *layout.keys, *batch.predicting]
    return [*found, *batch.per_completion.values()]
