"""The demo's verdict, and that a demo that was stopped goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from fasttr.cli.commands import main
from fasttr.errors import FasttrError
from fasttr.toy import demo as demo_module
from fasttr.toy.demo import ARMS, DemoSettings, demo
from fasttr.toy.demo_table import DRIFT, GOLD, Arm, Reading, difference, table, verdict

EQUAL_KL, BEST, LAST = GOLD
KL, OUTSIDE = DRIFT


def reading(best: float, last: float, kl: float = 2.0, outside: float = 0.3) -> Reading:
    measured = [(0.5, 0.0, 0.1), (best, kl / 2, outside / 2), (last, kl, outside)]
    rows = [dict(zip(("gold", "kl", "outside"), one, strict=True), length=9.0) for one in measured]
    return Reading(rows, ["ab"], accuracy=0.7)


def test_a_difference_is_paired_by_seed_and_spread_over_seeds():
    dpo = Arm("DPO", [reading(0.6, last) for last in (0.5, 0.4, 0.3)])
    other = Arm("TR", [reading(0.6, last) for last in (0.65, 0.5, 0.5)])
    found = difference(other, dpo, LAST)
    assert found.mean == pytest.approx(0.15)
    half = 4.303 * np.std([0.15, 0.1, 0.2], ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((0.15 - half, 0.15 + half))


def test_arms_are_compared_at_their_own_best_at_the_last_and_at_equal_kl():
    """At equal KL: between 1 and 2 nats DPO falls from 0.7 to 0.1, and the other, whose rows lie at
    0, 2 and 4, is on its way from 0.5 to 0.2."""
    dpo = Arm("DPO", [reading(0.7, 0.1)])
    late = Arm("TR", [reading(0.2, 0.8, kl=4.0)])
    found = {outcome.name: difference(late, dpo, outcome).mean for outcome in (*GOLD, *DRIFT)}
    assert found["best gold"] == pytest.approx(0.1)
    assert found["last gold"] == pytest.approx(0.7)
    assert found["gold at equal KL"] == pytest.approx((0.35 + 0.2) / 2 - (0.7 + 0.1) / 2)
    assert found["KL"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ((-0.2, -0.21, -0.19), "loses to DPO in gold at equal KL (TR), best gold (TR)"),
        ((0.2, 0.21, 0.19), "wins over DPO in gold at equal KL (TR), best gold (TR)"),
        ((-0.2, 0.3, 0.02), "is not shown to differ from DPO in gold reward"),
        ((-0.2,), "one seed decides nothing"),
    ],
)
def test_the_verdict_follows_the_intervals(gaps, words):
    dpo = Arm("DPO", [reading(0.6, 0.6)] * len(gaps))
    other = Arm("TR", [reading(0.6 + gap, 0.6 + gap) for gap in gaps])
    *_, sentence = verdict([dpo, other])
    said = " ".join(sentence.split())
    assert words in said
    assert ("bench/paper" in said) == ("loses" in words or "not shown" in words)
    assert "are higher" not in said


def test_the_verdict_says_that_a_policy_went_further():
    dpo = Arm("DPO", [reading(0.6, 0.6, kl) for kl in (1.0, 1.1, 1.2)])
    other = Arm("TR", [reading(0.6, 0.6, kl) for kl in (3.0, 3.2, 3.1)])
    differences, _, sentence = verdict([dpo, other])
    assert "these are higher: KL (TR)." in " ".join(sentence.split())
    assert "| +2.000 [+1.752, +2.248]* |" in differences
    assert "outside (TR)" not in sentence


def test_tables_fit_a_terminal():
    arms = [Arm(name, [reading(0.61, 0.6), reading(0.63, 0.5)]) for name in ARMS]
    text = "\n\n".join([table(arms), *verdict(arms)])
    assert max(map(len, text.splitlines())) <= 80
    line = next(one for one in text.splitlines() if one.startswith("| TR-DPO soft"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["TR-DPO soft", "0.620", "0.550", "2.00", "0.300", "9.0", "0.700"]


def test_the_two_moving_references_are_not_of_one_age():
    from fasttr.reference.schedule import Hard, Soft

    hard, soft = ARMS["TR-DPO hard"], ARMS["TR-DPO soft"]
    steps = DemoSettings().steps
    ages = [
        Hard(hard["ref_update_every"]).mean_age(steps),
        Soft(soft["ref_update_alpha"], soft["ref_update_every"]).mean_age(steps),
    ]
    assert ages == pytest.approx([2.5, 13.5], abs=0.1)


def test_a_demo_that_was_stopped_goes_on_and_ends_in_a_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_module, "PROMPTS", 6)
    monkeypatch.setattr(demo_module, "PAIRS", 40)
    monkeypatch.setattr(demo_module, "HELD_OUT_PAIRS", 12)
    monkeypatch.setattr(demo_module, "SFT_ROWS", 80)
    # Pictures are tested with their own module, and the report draws them too.
    monkeypatch.setattr(demo_module, "plot_run", lambda folder: [folder / "plots" / "loss.png"])
    monkeypatch.setattr(demo_module, "plot_comparison", lambda runs, out: [out / "loss.png"])
    monkeypatch.setattr(demo_module, "ARMS", {name: ARMS[name] for name in ("DPO", "TR-DPO soft")})
    settings = DemoSettings(str(tmp_path / "demo"), steps=2, sft_steps=2, seeds=2)
    trained = []

    class Stopped(Exception):
        pass

    monkeypatch.setattr(demo_module, "WIDTH", 16)
    monkeypatch.setattr(demo_module, "EVALUATIONS", 1)
    whole = demo_module.train

    def stops(config):
        if len(trained) == 2:
            raise Stopped
        return goes_on(config)

    def goes_on(config):
        """And leaves a checkpoint between two evaluations, as Ctrl-C does."""
        trained.append(config.output_dir)
        whole(config)
        folder = Path(config.output_dir)
        shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-1")

    monkeypatch.setattr(demo_module, "train", stops)
    with pytest.raises(Stopped):
        demo(settings)
    before = [path for path in trained]
    monkeypatch.setattr(demo_module, "train", goes_on)
    demo(settings)
    assert len(trained) == len(set(trained)) == 4, "no run was made twice"
    assert trained[:2] == before
    said = capsys.readouterr().out
    assert f"going on with the demo in {tmp_path / 'demo'}" in said
    assert "Verdict: on this task" in said
    assert "holds no checkpoint" not in said
    assert "Over 2 seeds:" in (tmp_path / "demo" / "report.html").read_text()
    assert "Verdict" in (tmp_path / "demo" / "table.md").read_text()
    assert all(one.isprintable() or one == "\n" for one in said)
    judged = json.loads((tmp_path / "demo" / "dpo-seed-0" / "judged.json").read_text())
    assert [row["step"] for row in judged["rows"]] == [0, 2]
    assert judged["rows"][0]["kl"] == 0
    assert len(judged["completions"]) == 6


def test_ctrl_c_between_two_trainings_ends_in_two_lines(tmp_path, capsys, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "supervised_start", pressed)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--output_dir", str(tmp_path / "demo")])
    assert stopped.value.code == 130
    said = capsys.readouterr()
    assert said.out.endswith("the same command goes on with the demo\n")
    assert said.err == "fasttr: stopped\n"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FasttrError, match="holds something that is not a demo"):
        demo(DemoSettings(str(tmp_path)))
    assert (tmp_path / "mine.txt").exists()
