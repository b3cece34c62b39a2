"""Rows that come one after the other: only those that a run takes are read."""

from __future__ import annotations

import json

import datasets
import pytest

from fasttr import TrainConfig, train
from fasttr.errors import FasttrError
from tests.runs import run, same_weights, settings, steps


def test_a_stream_trains_as_its_file_in_order(workspace, tmp_path):
    common = {"max_steps": 3, "train_batch_size": 4}
    run(workspace, tmp_path / "file", train_sampling_strategy="sequential", **common)
    run(workspace, tmp_path / "stream", streaming=True, **common)
    assert same_weights(tmp_path / "file", tmp_path / "stream")
    assert len(steps(tmp_path / "stream")) == 3


def test_an_endless_stream_has_an_end(workspace, tmp_path):
    """Only as many rows are read as the steps take, in blocks."""
    lines = (workspace / "train.jsonl").read_text().splitlines()
    read = []

    def rows():
        while True:
            for line in lines:
                read.append(line)
                yield json.loads(line)

    stream = datasets.IterableDataset.from_generator(rows)
    values = settings(workspace, tmp_path, max_steps=2, train_batch_size=3) | {"dataset_name": None}
    assert train(TrainConfig(**values), train_dataset=stream).steps == 2
    assert 6 <= len(read) < 10_000


def test_what_needs_the_number_of_rows_is_refused(workspace, tmp_path):
    with pytest.raises(FasttrError, match=r"max_steps: missing with streaming; .* must be given"):
        run(workspace, tmp_path, streaming=True, max_steps=-1)
    parts = [{"path": str(workspace / "train.jsonl"), "fraction": 0.5}]
    with pytest.raises(FasttrError, match=r"streaming: .*fraction and test_split_size cannot"):
        run(workspace, tmp_path, streaming=True, dataset_name=None, datasets=parts)


def test_a_stream_that_breaks_is_one_line(workspace, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = (workspace / "train.jsonl").read_bytes().splitlines(keepends=True)
    broken = b'{"prompt": "a", "chosen": "b", "rejected": "\xed\xa0\xbd"}\n'
    path.write_bytes(b"".join([*good[:3], broken]))
    with pytest.raises(FasttrError, match=r"the rows of the stream cannot be read \(Unicode.*\)"):
        run(workspace, tmp_path / "out", dataset_name=str(path), streaming=True, max_steps=2)

    def rows():
        yield json.loads(good[0])
        raise RuntimeError("no more")

    stream = datasets.IterableDataset.from_generator(rows)
    values = settings(workspace, tmp_path, max_steps=2) | {"dataset_name": None}
    with pytest.raises(FasttrError, match=r"cannot be read \(RuntimeError: no more\)"):
        train(TrainConfig(**values), train_dataset=stream)
