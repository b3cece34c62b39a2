"""`python -m bench all`: what a person without patience sees first."""

from __future__ import annotations

import json

from bench import everything
from bench.everything import Entry
from bench.harness import parsed

HEAD = ["head", "--shapes", "tiny", "--tokens", "64", "--seconds", "0.05", "--inputs", "flat"]
HEAD += ["--providers", "fasttr,eager"]


def run(tmp_path, budget: str) -> str:
    """The report."""
    given = ["--budget", budget, "--tiny", "--cpu", "--out", str(tmp_path)]
    everything.main(parsed(everything, *given))
    return (tmp_path / "report.md").read_text()


def test_the_kept_table_beside_trl_comes_first_then_each_as_it_is_measured(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(everything, "plan", lambda args: [Entry("head", 1.0, HEAD)])
    report = run(tmp_path, "1h")
    shown = capsys.readouterr().out
    kept = shown.index("Kept results, measured before")
    beside_trl = shown.index("| trl-default |")
    here = shown.index("Measured here")
    assert kept < beside_trl < here < shown.index("share of bare products")
    assert "python -m bench head --shapes tiny" in shown[here:]
    assert "python -m bench head --shapes tiny" in report
    assert json.loads((tmp_path / "head" / "head.json").read_text())["cases"]
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]


def test_what_the_budget_does_not_hold_is_named(tmp_path):
    report = run(tmp_path, "0s")
    for name in ("head", "step", "overhead"):
        assert f"- {name}: not started, the budget was spent" in report


def test_a_benchmark_is_cut_at_its_limit_and_one_that_fails_says_why(tmp_path):
    assert everything.run_entry(Entry("head", 1.0, HEAD), tmp_path, limit=0.2).startswith("cut off")
    wrong = Entry("lerp", 1.0, ["lerp", "--models", "no-such-model"])
    assert "no-such-model" in everything.run_entry(wrong, tmp_path, limit=600.0)
