"""`fasttr sweep`: which runs it makes, that it goes on, and what it ends in."""

from __future__ import annotations

import re

import pytest

from fasttr.cli import main
from fasttr.cli.sweep import Combination, combinations, split_at_commas, sweep
from fasttr.errors import FasttrError
from tests.runs import error_line, flags, lines, settings


def test_commas_separate_runs_and_brackets_hold_a_list_together():
    assert split_at_commas("0.05,0.1, 0.3") == ["0.05", "0.1", "0.3"]
    assert split_at_commas("[sigmoid,sft],ipo") == ["[sigmoid,sft]", "ipo"]
    assert split_at_commas('{"a": 1, "b": 2}') == ['{"a": 1, "b": 2}']


def test_every_combination_is_one_run():
    found = combinations({"beta": ["0.1", "0.3"], "loss_type": ["[sigmoid,sft]", "ipo"]})
    assert [one.name for one in found] == [
        "beta-0.1_loss_type-sigmoid-sft",
        "beta-0.1_loss_type-ipo",
        "beta-0.3_loss_type-sigmoid-sft",
        "beta-0.3_loss_type-ipo",
    ]


def test_what_a_fixed_reference_does_not_read_makes_no_second_run():
    found = combinations({"ref_update": ["none", "soft"], "ref_update_every": ["2", "3"]})
    assert [dict(one.values) for one in found] == [
        {"ref_update": "none"},
        {"ref_update": "soft", "ref_update_every": "2"},
        {"ref_update": "soft", "ref_update_every": "3"},
    ]


class Starts:
    """Runs command lines in this process and remembers them."""

    def __init__(self, fails: str = "no such run"):
        self.lines: list[list[str]] = []
        self.fails = fails

    def __call__(self, line: list[str]) -> int:
        self.lines.append(line)
        if any(self.fails in word for word in line):
            return 2
        main(line)
        return 0


def given(workspace, tmp_path) -> list[str]:
    values = settings(workspace, tmp_path, max_steps=2)
    values |= {"eval_strategy": "steps", "eval_dataset_name": str(workspace / "test.jsonl")}
    return [word for word in flags(values) if not word.startswith("--output_dir")]


PLANNED = [Combination(f"beta-{beta}", {"beta": beta}) for beta in ("0.1", "0.4")]


def test_a_sweep_ends_in_a_table_and_a_report_and_is_not_run_twice(workspace, tmp_path, capsys):
    words, start = given(workspace, tmp_path), Starts()
    sweep("dpo", words, PLANNED, tmp_path, start)
    assert len(start.lines) == 2
    assert lines(tmp_path / "beta-0.4")[-1]["train_runtime"] > 0
    table = (tmp_path / "sweep.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in table[:4]] == ["beta", "---", "0.1", "0.4"]
    assert "held-out accuracy against the initial policy" in table[0]
    assert re.search("beta</th><td>0.1</td><td>0.4", (tmp_path / "report.html").read_text())

    again = Starts()
    (tmp_path / "beta-0.4" / "model.safetensors").unlink()  # as if it had been killed
    sweep("dpo", words, PLANNED, tmp_path, again)
    assert [line[-4:] for line in again.lines] == [
        ["--output_dir", str(tmp_path / "beta-0.4"), "--overwrite_output_dir", "true"]
    ]
    assert "done before" in capsys.readouterr().out


def test_a_run_that_fails_leaves_the_others_and_is_told(workspace, tmp_path):
    words = given(workspace, tmp_path)
    with pytest.raises(FasttrError, match="1 of 2 runs failed"):
        sweep("dpo", words, PLANNED, tmp_path, Starts(fails="beta-0.1"))
    table = (tmp_path / "sweep.md").read_text()
    assert "failed, status 2" in table
    assert (tmp_path / "report.html").exists()


def test_a_folder_of_another_sweep_is_refused(workspace, tmp_path):
    words = given(workspace, tmp_path)
    sweep("dpo", words, PLANNED[:1], tmp_path, Starts())
    start = Starts()
    with pytest.raises(
        FasttrError, match=r"beta-0\.1 was made with other settings .*learning_rate"
    ):
        sweep("dpo", [*words, "--learning_rate", "1e-5"], PLANNED[:1], tmp_path, start)
    assert start.lines == []


def test_a_mistake_in_the_last_run_is_told_before_the_first(workspace, tmp_path):
    start = Starts()
    wrong = [*PLANNED, Combination("beta--1", {"beta": "-1"})]
    with pytest.raises(FasttrError, match=r"beta: got -1\.0"):
        sweep("dpo", given(workspace, tmp_path), wrong, tmp_path, start)
    assert start.lines == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["--beta", "0.1", "--output_dir", "x"],
            "got nothing to vary; wanted a setting with commas",
        ),
        (["--beta", "0.1,0.2"], "output_dir: missing"),
    ],
)
def test_mistakes_are_one_line(words, answer, capsys):
    assert error_line(capsys, ["sweep", *words]).startswith(answer)
