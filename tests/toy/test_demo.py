"""The demo's verdict, and that a demo that was stopped goes on."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fasttr.errors import FasttrError
from fasttr.toy import demo as demo_module
from fasttr.toy.demo import ARMS, DemoSettings, demo
from fasttr.toy.demo_table import Arm, Reading, difference, verdict


def reading(peak: list[float], end: list[float]) -> Reading:
    golds = {0: [0.2] * len(peak), 5: peak, 10: end}
    return Reading(golds, dict.fromkeys(golds, 1.0), 9.0, ["ab"], accuracy=0.7, updates=2)


def arm(name: str, ends: list[list[float]], peaks: list[list[float]] | None = None) -> Arm:
    return Arm(name, [reading(p, e) for p, e in zip(peaks or ends, ends, strict=True)])


def test_a_difference_is_paired_by_seed_and_prompt_and_spread_over_seeds():
    dpo = arm("DPO", [[0.1, 0.9], [0.4, 0.6], [0.0, 0.8]])
    other = arm("TR", [[0.3, 1.0], [0.5, 0.7], [0.3, 0.9]])
    of_seeds = [0.15, 0.1, 0.2]
    found = difference(other, dpo, lambda one: one.last)
    assert found.mean == pytest.approx(0.15)
    assert found.half_width == pytest.approx(4.303 * np.std(of_seeds, ddof=1) / math.sqrt(3))


def test_arms_are_compared_at_their_own_peaks():
    dpo = arm("DPO", [[0.1, 0.1]], peaks=[[0.8, 0.6]])
    late = arm("TR", [[0.9, 0.7]], peaks=[[0.2, 0.2]])
    assert difference(late, dpo, lambda one: one.peak).mean == pytest.approx(0.1)
    assert difference(late, dpo, lambda one: one.last).mean == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ((-0.2, -0.21, -0.19), "the moving reference loses to DPO"),
        ((0.2, 0.21, 0.19), "the moving reference wins over DPO"),
        ((-0.2, 0.3, 0.02), "no difference to DPO is shown"),
        ((-0.2,), "one seed decides nothing"),
    ],
)
def test_the_verdict_follows_the_intervals(gaps, words):
    dpo = arm("DPO", [[0.5, 0.7]] * len(gaps))
    other = arm("TR-DPO", [[0.5 + gap, 0.7 + gap] for gap in gaps])
    *_, sentence = verdict([dpo, other])
    assert words in sentence
    assert ("bench/paper" in sentence) == ("loses" in words or "no difference" in words)


def test_the_two_moving_references_are_not_of_one_age():
    from fasttr.reference.schedule import Hard, Soft

    hard, soft = ARMS["TR-DPO hard"], ARMS["TR-DPO soft"]
    ages = [
        Hard(hard["ref_update_every"]).mean_age(120),
        Soft(soft["ref_update_alpha"], soft["ref_update_every"]).mean_age(120),
    ]
    assert ages[0] > 1.3 * ages[1]


def test_a_demo_that_was_stopped_goes_on_and_ends_in_a_verdict(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_module, "PROMPTS", 6)
    monkeypatch.setattr(demo_module, "PAIRS", 40)
    monkeypatch.setattr(demo_module, "HELD_OUT_PAIRS", 12)
    monkeypatch.setattr(demo_module, "SFT_ROWS", 80)
    # Pictures are tested with their own module, and the report draws them too.
    monkeypatch.setattr(demo_module, "plot_run", lambda folder: [folder / "plots" / "loss.png"])
    monkeypatch.setattr(demo_module, "plot_comparison", lambda runs, out: [out / "loss.png"])
    monkeypatch.setattr(demo_module, "ARMS", {name: ARMS[name] for name in ("DPO", "TR-DPO soft")})
    settings = DemoSettings(str(tmp_path / "demo"), steps=4, sft_steps=2, seeds=2)
    trained = []

    class Stopped(Exception):
        pass

    whole = demo_module.train

    def stops(config):
        if len(trained) == 3:
            raise Stopped
        trained.append(config.output_dir)
        return whole(config)

    monkeypatch.setattr(demo_module, "train", stops)
    with pytest.raises(Stopped):
        demo(settings)
    before = [path for path in trained]
    monkeypatch.setattr(
        demo_module, "train", lambda config: (trained.append(config.output_dir), whole(config))[1]
    )
    demo(settings)
    assert len(trained) == len(set(trained)) == 5, "no run was made twice"
    assert trained[:3] == before
    said = capsys.readouterr().out
    assert f"going on with the demo in {tmp_path / 'demo'}" in said
    assert "Verdict: on this task" in said
    assert (tmp_path / "demo" / "report.html").exists()
    assert "Verdict" in (tmp_path / "demo" / "table.md").read_text()
    assert all(one.isprintable() or one == "\n" for one in said)
    judged = json.loads((tmp_path / "demo" / "dpo-seed-0" / "judged.json").read_text())
    assert [len(values) for values in judged["golds"].values()] == [6] * len(judged["golds"])


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FasttrError, match="holds something that is not a demo"):
        demo(DemoSettings(str(tmp_path)))
    assert (tmp_path / "mine.txt").exists()
