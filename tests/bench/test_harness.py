"""What all benchmarks share: who gets a number, how a time is taken, what a run leaves behind."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from bench import __main__ as command
from bench import lerp
from bench.harness import Contender, compare, parse_seconds, parsed
from bench.timing import Times, interleaved, peak_bytes_of

CPU = torch.device("cpu")


def test_only_who_is_right_and_present_gets_a_time():
    ran = []

    def fails():
        raise RuntimeError("no such kernel\nand more")

    contenders = {
        "right": Contender(lambda: ran.append("right")),
        "wrong": Contender(lambda: ran.append("wrong"), check=lambda: "off by 2"),
        "absent": Contender(lambda: ran.append("absent"), absent="not installed: it"),
        "failing": Contender(lambda: ran.append("failing"), check=fails),
    }
    yardstick = {"yardstick": lambda: ran.append("yardstick")}
    found = compare(contenders, CPU, seconds=0.0, yardsticks=yardstick)
    assert set(found.times) == {"right", "yardstick"}
    assert set(ran) == {"right", "yardstick"}
    assert found.wrong == {"wrong": "off by 2"}
    assert found.absent == {
        "absent": "not installed: it",
        "failing": "failed: RuntimeError: no such kernel",
    }


def test_providers_take_turns_forwards_and_backwards():
    ran = []
    calls = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    times = interleaved(calls, CPU, seconds=0.0, warm_seconds=0.0, least=2)
    warm_up, turns = ran[:3], ran[3:]
    assert warm_up == ["a", "b", "c"]
    assert turns == ["a", "b", "c", "c", "b", "a"]
    assert [time.calls for time in times.values()] == [2, 2, 2]


def test_medians_and_percentiles():
    turns = tuple(float(i) for i in range(11))
    assert Times.of(turns) == Times(5.0, 2.0, 8.0, 11, turns)


def test_peak_memory_counts_what_a_call_holds_at_once():
    def call():
        a = torch.zeros(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return (b + 1).sum()

    assert 8 << 20 <= peak_bytes_of(call, CPU) < 9 << 20


def test_a_run_is_kept_with_what_it_was_made_with(tmp_path, capsys):
    given = ["--models", "tiny", "--cases", "fp32 <- fp32", "--seconds", "0.02"]
    result = lerp.BENCHMARK.run(parsed(lerp, *given, "--out", str(tmp_path), "--cpu"))
    kept = json.loads((tmp_path / "lerp.json").read_text())
    assert kept == json.loads(json.dumps(result))
    facts = kept["environment"]
    for key in ("command", "threads", "load_average", "time", "cpu", "devices"):
        assert key in facts
    assert facts["versions"]["torch"] == torch.__version__
    assert lerp.table(kept["cases"][0]) in capsys.readouterr().out


def test_the_commit_of_a_copy_without_history_can_be_told(monkeypatch):
    from bench import timing

    monkeypatch.setattr(timing, "environment", lambda: {"git_commit": None})
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    assert timing.header("it")["git_commit"] == "0123abc"


def test_budgets_and_unknown_commands():
    times = [parse_seconds(text) for text in ("9m", "240s", "1h", "30")]
    assert times == [540.0, 240.0, 3600.0, 30.0]
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a time"):
        parse_seconds("soon")
    with pytest.raises(SystemExit):
        command.main(["nothing"])
