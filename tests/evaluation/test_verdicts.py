"""Verdict files of outside judges, in their own formats."""

from __future__ import annotations

import json

import pytest

from fasttr.cli import main
from fasttr.errors import FasttrError
from fasttr.evaluation.verdicts import read_verdicts
from fasttr.metrics.results import estimate, read_results
from tests.runs import error_line, write_rows


def preferences(values) -> list[dict]:
    return [
        {
            "instruction": f"question {i}",
            "output_1": "base",
            "output_2": "mine " * i,
            "generator_1": "gpt4_1106_preview",
            "generator_2": "mine",
            "preference": value,
        }
        for i, value in enumerate(values)
    ]


def test_alpaca_eval_s_preferences_run_from_1_to_2_and_0_is_a_draw(tmp_path):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(preferences([1.9, 1.0, 0, 2.0, None])))
    (results,) = read_verdicts(file, "alpaca_eval")
    assert results.values == pytest.approx([0.9, 0.0, 0.5, 1.0])
    assert results.no_effect == 0.5


def games(first: str, second: str, uid: str) -> dict:
    return {"uid": uid, "model": "mine", "games": [{"score": first}, {"score": second}]}


def test_arena_hard_counts_strong_verdicts_three_times_and_swaps_the_second_game(tmp_path):
    """In the first game A is the baseline, in the second one the model."""
    rows = [
        games("B>A", "A>B", "wins both"),
        games("A>>B", "A=B", "loses strongly, then draws"),
        games("A>B", "B>>A", "loses both, once strongly"),
        {"uid": "unjudged", "model": "mine", "games": [{"score": None}, {"score": "A>B"}]},
    ]
    (results,) = read_verdicts(write_rows(tmp_path / "mine.jsonl", rows), "arena_hard")
    battles = [1, 1, 0, 0, 0, 0.5, 0, 0, 0, 0]
    found = estimate(results.values)
    assert found.mean == pytest.approx(sum(battles) / len(battles))
    assert found.n == 3
    sums, counts, ratio = [2, 0.5, 0], [2, 4, 4], 0.25
    gaps = [s - ratio * c for s, c in zip(sums, counts, strict=True)]
    stderr = (sum(gap**2 for gap in gaps) / 2 / 3) ** 0.5 / (10 / 3)
    assert found.stderr == pytest.approx(stderr)


def test_mt_bench_averages_all_turns_that_have_a_score(tmp_path):
    rows = [
        {"question_id": question, "turn": turn, "score": score, "model": "mine"}
        for question, turn, score in [(81, 1, 9), (81, 2, 4), (82, 1, 7), (82, 2, -1)]
    ]
    (results,) = read_verdicts(write_rows(tmp_path / "single.jsonl", rows), "mt_bench")
    assert estimate(results.values).mean == pytest.approx(20 / 3)
    assert (len(results.values), results.no_effect) == (2, None)


def test_a_pairwise_judge_who_likes_the_first_place_has_no_say(tmp_path):
    def both(name, first, second):
        orders = {"policy first": first, "policy second": second}
        return [{"id": name, "order": k, "verdict": v} for k, v in orders.items()]

    rows = [
        *both("a", "A", "A"),
        *both("b", "A", "B"),
        *both("c", "tie", "A"),
        *both("d", "B", None),
    ]
    (results,) = read_verdicts(write_rows(tmp_path / "pairs.jsonl", rows), "pairwise")
    assert results.values == pytest.approx([0.5, 1.0, 0.25])


def test_verdicts_reach_the_folder_of_a_run(tmp_path, capsys):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(preferences([1.75, 1.25, 2.0])))
    words = ["--verdicts", str(file), "--verdicts_format", "alpaca_eval"]
    main(["eval", *words, "--results_dir", str(tmp_path)])
    assert "alpaca eval: win rate: 0.6667 (95 % interval" in capsys.readouterr().out
    assert read_results(tmp_path)["alpaca_eval_win_rate"].values == [0.75, 0.25, 1.0]
    assert "verdicts_format: missing" in error_line(capsys, ["eval", "--verdicts", str(file)])


@pytest.mark.parametrize(
    ("kind", "rows", "answer"),
    [
        ("arena_hard", [games("A!B", "A>B", "x")], "is not as arena_hard writes it: KeyError"),
        ("mt_bench", [{"question_id": 1}], "is not as mt_bench writes it"),
        ("pairwise", [{"id": 1, "order": "policy first", "verdict": None}], "holds no verdict"),
    ],
)
def test_a_file_of_another_kind_is_one_line(kind, rows, answer, tmp_path):
    with pytest.raises(FasttrError, match=answer):
        read_verdicts(write_rows(tmp_path / "file.jsonl", rows), kind)
