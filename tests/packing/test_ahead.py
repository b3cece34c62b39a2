"""Packs are made a step ahead, in another thread, and are the same; they reach a device in one
copy."""

from __future__ import annotations

import threading

import pytest
import torch

from fasttr.batch import one_buffer, views_of
from fasttr.packing.ahead import PacksAhead
from fasttr.packing.layout import pack
from tests.tiny import random_trees

STEPS = 5


class Made:
    """Notes which step is made where; the pack of a step is its number."""

    def __init__(self):
        self.steps: list[int] = []
        self.threads: dict[int, int] = {}

    def __call__(self, step):
        if step == 3:
            raise ValueError("no rows")
        self.steps.append(step)
        self.threads[step] = threading.get_ident()
        return [step]


def test_the_next_step_is_made_in_another_thread_and_nothing_twice():
    made = Made()
    ahead = PacksAhead(made, STEPS)
    assert [ahead(step) for step in range(3)] == [[0], [1], [2]]
    assert made.steps == [0, 1, 2]
    here = threading.get_ident()
    assert [made.threads[step] == here for step in range(3)] == [True, False, False]


def test_an_error_is_raised_where_its_step_is_asked_for():
    ahead = PacksAhead(Made(), STEPS)
    assert ahead(2) == [2]
    with pytest.raises(ValueError, match="no rows"):
        ahead(3)
    assert ahead(4) == [4]


def test_a_jump_makes_what_is_asked_for_and_nothing_beyond_the_last():
    made = Made()
    ahead = PacksAhead(made, STEPS)
    ahead(0)
    assert ahead(4) == [4]
    assert ahead(1) == [1]
    assert ahead(2) == [2]
    assert max(made.steps) == 4
    assert made.steps.count(2) == 1


def test_views_of_one_buffer_are_the_tensors():
    """Of every kind that a pack has, empty ones and odd lengths among them."""
    trees = random_trees([(5, 4, 6), (0, 3, 1), (3, 7, 2)])
    batch = pack(trees)
    tensors = [
        *(batch.input_ids, batch.target, batch.token_counts, batch.weights, batch.labels),
        *batch.attention.keys,
        *batch.predicting,
        torch.empty(0, dtype=torch.int32),
        torch.arange(6, dtype=torch.int16).view(2, 3).t(),
    ]
    assert {x.dtype for x in tensors} > {torch.int64, torch.int32, torch.float32, torch.bool}
    assert any(x.nbytes % 16 for x in tensors)
    buffer = one_buffer(tensors)
    found = views_of(buffer.clone(), tensors)
    for got, want in zip(found, tensors, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
        assert (got.data_ptr() - found[0].data_ptr()) % 16 == 0, "as kernels want it"


def test_a_pack_that_moves_is_the_same_pack():
    batch = pack(random_trees([(5, 4, 6), (3, 7, 2)]))
    moved = batch.to(torch.device("meta"))
    for name, x in batch._asdict().items():
        if isinstance(x, torch.Tensor):
            stays = name.startswith("cu_")
            assert getattr(moved, name).device.type == ("cpu" if stays else "meta"), name
            assert getattr(moved, name).shape == x.shape
    assert moved.attention.on_host is batch.attention.on_host
    for got, want in (
        (moved.attention.keys, batch.attention.keys),
        (moved.predicting, batch.predicting),
        ([moved.attention.cu_q, moved.attention.cu_k], [batch.attention.cu_q] * 2),
    ):
        assert [x.shape for x in got] == [x.shape for x in want]
        assert {x.device.type for x in got} == {"meta"}
