"""The plan for a GPU, dry: every part runs on a CPU at toy sizes; what is finished is not run
again; what is cut or fails costs one part."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench.gpu import process, report, runner
from bench.gpu.notes import CUT, FAILED, PASSED, Notes, is_finished, read_line
from bench.gpu.plan import BY_NAME, PARTS, Part
from bench.gpu.predictions import PREDICTIONS, Predicted, within
from bench.harness import parsed

CPU = torch.device("cpu")


def run(tmp_path, *more):
    given = ["--dry", "--in_process", "--budget", "1h", "--state", str(tmp_path / "state")]
    runner.main(parsed(runner, *given, "--out", str(tmp_path / "out"), *more))
    return {line["part"]: line for line in report.lines_of(tmp_path / "state")}


def test_every_part_finishes_on_a_cpu_and_leaves_few_files(tmp_path):
    lines = run(tmp_path)
    assert list(lines) == [part.name for part in PARTS]
    for name, line in lines.items():
        assert line["status"] == PASSED, (name, line["reason"])
        assert line["dry"]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} <= {
        *("gpu.jsonl", "report.md", "log.txt", "profile.json.gz", "plots.tar")
    }
    kept = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert kept == list(lines.values())
    text = (out / "report.md").read_text()
    assert "no figure here means anything" in text
    assert "| fasttr | " in text  # the table of peers
    # Predictions are found by the names that the parts give their figures.
    shown = {figure["what"] for line in lines.values() for figure in line["figures"]}
    assert {"copy", "idle share", "product of 8192 cubed", "own host time of a step"} <= shown


@pytest.fixture
def a_plan(monkeypatch, tmp_path):
    """Three parts of this file's making."""
    seen = []

    def works(task):
        seen.append("works")
        task.notes.figure("speed", 3.14159, "GB/s")
        task.notes.check("it holds", True)

    def fails(task):
        seen.append("fails")
        task.notes.figure("half way", 1.0)
        raise RuntimeError("no memory\nfor this")

    def wrong(task):
        seen.append("wrong")
        task.notes.check("it holds", False, "off by one")

    module = type("module", (), {"works": works, "fails": fails, "wrong": wrong})
    monkeypatch.setattr(process.importlib, "import_module", lambda name: module)
    parts = tuple(Part(name, 10, f"toy:{name}", "", "") for name in ("fails", "works", "wrong"))
    for target in (runner, report):
        monkeypatch.setattr(target, "PARTS", parts)
    monkeypatch.setattr(runner, "BY_NAME", {part.name: part for part in parts})
    return seen


def test_a_part_that_fails_says_why_keeps_what_it_had_and_stops_no_other(tmp_path, a_plan):
    lines = run(tmp_path)
    assert {name: line["status"] for name, line in lines.items()} == {
        "fails": FAILED,
        "works": PASSED,
        "wrong": FAILED,
    }
    assert lines["fails"]["reason"] == "RuntimeError: no memory"
    assert lines["fails"]["figures"][0]["what"] == "half way"
    assert lines["wrong"]["reason"] == "it holds"
    assert lines["works"]["figures"] == [{"what": "speed", "value": 3.14, "unit": "GB/s"}]


def test_a_part_that_passed_runs_again_only_when_asked_or_when_the_code_changed(
    tmp_path, a_plan, monkeypatch
):
    run(tmp_path)
    assert a_plan == ["fails", "works", "wrong"]
    run(tmp_path)
    assert a_plan[3:] == ["fails", "wrong"]
    run(tmp_path, "--parts", "works", "--again", "works")
    assert a_plan[5:] == ["works"]
    monkeypatch.setattr(runner, "code_digest", lambda: "other code")
    run(tmp_path, "--parts", "works")
    assert a_plan[6:] == ["works"]


def test_what_was_never_tried_comes_before_what_failed(tmp_path, a_plan):
    run(tmp_path, "--parts", "fails")
    run(tmp_path)
    assert a_plan == ["fails", "works", "wrong", "fails"]


def test_a_line_of_an_earlier_machine_is_taken_up(tmp_path, a_plan):
    run(tmp_path / "first")
    (tmp_path / "second" / "state").mkdir(parents=True)
    text = (tmp_path / "first" / "out" / "gpu.jsonl").read_text()
    (tmp_path / "second" / "state" / "gpu.jsonl").write_text(text)
    a_plan.clear()
    run(tmp_path / "second")
    assert "works" not in a_plan


def test_a_part_that_does_not_fit_the_budget_is_not_started(tmp_path, a_plan, capsys):
    lines = run(tmp_path, "--budget", "20s")
    assert lines == {}
    assert "do not fit" in capsys.readouterr().out


def test_a_part_of_its_own_process_is_cut_at_its_limit(tmp_path):
    launch = process.Launch(tmp_path, "code", dry=True)
    began = time.monotonic()
    process.run_apart(BY_NAME["kernels"], launch, limit=0.5)
    assert time.monotonic() - began < 30
    line = read_line(tmp_path, "kernels")
    assert line is not None
    assert line["status"] == CUT


def test_a_result_counts_on_its_own_device_alone(tmp_path):
    notes = Notes(tmp_path / "it.json", "facts", code="code", device=CPU, dry=False)
    notes.close(PASSED)
    assert is_finished(notes.line, code="code", device=notes.line["device"])
    assert not is_finished(notes.line, code="code", device="nvidia-h200")
    assert not is_finished(notes.line, code="other", device=notes.line["device"])


def test_a_figure_stands_beside_its_prediction(tmp_path):
    notes = Notes(tmp_path / "it.json", "facts", code="code", device=CPU, dry=False)
    notes.figure("copy", 3100.0, "GB/s")
    notes.figure("layer products, T 16384", 700.0, "TFLOP/s")
    notes.close(PASSED)
    text = report.tables([notes.line])
    assert "| copy | 3100 GB/s | 4,000 to 4,500 (seen on such a machine) | below |" in text
    assert "1 of 2" in report.summary([notes.line])


@pytest.mark.parametrize(
    ("predicted", "verdicts"),
    [
        (within(100.0), ["below", "as predicted", "above"]),
        (Predicted(90.0, None, "goal"), ["below", "as predicted", "as predicted"]),
        (Predicted(None, 110.0, "goal"), ["as predicted", "as predicted", "above"]),
    ],
)
def test_a_prediction_is_met_or_missed_on_a_side(predicted, verdicts):
    assert [predicted.verdict(value) for value in (79.0, 100.0, 121.0)] == verdicts


def test_the_list_names_every_part_with_its_seconds():
    text = runner.listing()
    assert all(part.name in text for part in PARTS)
    assert {part for part, _ in PREDICTIONS} <= set(BY_NAME)
