"""metrics.jsonl: what a resumed run keeps of it, and what a disk does to it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fasttr.errors import FasttrError
from fasttr.metrics.log import MetricsLog, last_line
from fasttr.metrics.trackers import TrackerConfig
from tests.runs import lines


def log(folder: Path, keep_until: int | None = None) -> MetricsLog:
    return MetricsLog(folder, TrackerConfig(), keep_until=keep_until)


def test_a_fresh_run_begins_a_new_file_and_a_resumed_one_keeps_its_steps(tmp_path):
    first = log(tmp_path)
    for step in (1, 2, 2, 3):
        first.write(step, {"loss": 0.1 + step})
    first.close()
    resumed = log(tmp_path, keep_until=2)
    resumed.write(3, {"loss": 9.25})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.1),
        (2, 2.1),
        (2, 2.1),
        (3, 9.25),
    ]
    log(tmp_path)
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    "torn",
    [b'{"step": 3, "lo', b"\x00\x00\x00", b"\xff\xfe", b"[3]", b'{"loss": 1.0}', b'{"step": "3"}'],
    ids=["cut", "zeros", "bytes", "list", "no step", "text step"],
)
def test_a_line_that_a_crash_left_ends_what_is_kept(tmp_path, torn):
    good = json.dumps({"step": 1, "loss": 0.7}).encode()
    later = json.dumps({"step": 2, "loss": 0.6}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(good + b"\n" + torn + b"\n" + later + b"\n")
    log(tmp_path, keep_until=5)
    assert lines(tmp_path) == [{"step": 1, "loss": 0.7}]


def test_the_last_line_is_empty_where_none_can_be_read(tmp_path):
    assert last_line(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "train_runtime": 3.5}\n')
    assert last_line(tmp_path) == {"step": 2, "train_runtime": 3.5}
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00")
    assert last_line(tmp_path) == {}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    open_log = log(tmp_path)
    open_log.write(1, {"loss": 0.7})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    wanted = re.escape("No space left on device; free some space and resume")
    with pytest.raises(FasttrError, match=rf"cannot write .*metrics\.jsonl: .*{wanted}"):
        open_log.write(2, {"loss": 0.6})
    open_log.close()
    with pytest.raises(FasttrError, match=wanted):
        log(tmp_path)
    monkeypatch.undo()
    assert lines(tmp_path) == [{"step": 1, "loss": 0.7}]
