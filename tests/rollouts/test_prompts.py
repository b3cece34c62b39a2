"""Prompts of runs on rollouts: which are kept, and with what."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig

from fasttr.errors import FasttrError
from fasttr.models.load import load_tokenizer
from fasttr.rollouts.prompts import with_room

ROWS = [
    {"prompt": "alpha?", "answer": 1},
    {"prompt": "beta " * 40, "answer": 2},
    {"prompt": "gamma delta?", "answer": 3},
]


def test_prompts_without_room_for_a_completion_are_dropped_and_counted(workspace, capsys):
    tokenizer = load_tokenizer(str(workspace / "model"))
    config = LlamaConfig(max_position_embeddings=32)
    kept = with_room(tokenizer, ROWS, "rows", config, 12)
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in kept.ids] == [
        "alpha?",
        "gamma delta?",
    ]
    assert kept.columns["answer"] == [1, 3]
    assert kept.positions.tolist() == [0, 2]
    assert "dropped 1: longer than 20 tokens" in capsys.readouterr().out

    last = kept.picked(np.array([1]))
    assert (last.raw[0], last.columns["answer"], last.positions.tolist()) == (kept.raw[1], [3], [2])

    with pytest.raises(FasttrError, match="got 32, and the model has 32 positions"):
        with_room(tokenizer, ROWS, "rows", config, 32)
    with pytest.raises(FasttrError, match="rows: every prompt has more than 1 tokens"):
        with_room(tokenizer, ROWS, "rows", config, 31)
