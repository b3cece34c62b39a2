"""The over-optimisation study: what is claimed of intervals over seeds, and a whole run."""

from __future__ import annotations

import json

import pytest

from bench.paper import curves, overoptimization
from bench.paper.curves import Run


def made_up(
    gold_fixed, gold_moving, kl_fixed=(0, 1, 2, 4), kl_moving=(0, 1, 2, 4), seeds=3
) -> list[Run]:
    runs = []
    for seed in range(seeds):
        for arm in curves.ARMS:
            kl, gold = (kl_fixed, gold_fixed) if arm == "fixed" else (kl_moving, gold_moving)
            rows = [
                {
                    "step": i,
                    "kl": k,
                    "gold": g + 0.001 * seed * (i + (arm == "hard")),
                    "length": 9.0 + k,
                }
                for i, (k, g) in enumerate(zip(kl, gold, strict=True))
            ]
            runs.append(Run("sigmoid", arm, 0.1, seed, rows))
    return runs


def test_verdict_where_the_claim_holds():
    said = curves.verdict(made_up((0.5, 0.6, 0.4, 0.1), (0.5, 0.6, 0.62, 0.63)))
    assert "DPO, soft: **the claim holds here**" in said
    assert "a moving reference gives less gold: nowhere shown" in said


def test_verdict_where_it_does_not():
    same = curves.verdict(made_up((0.5, 0.6, 0.4, 0.1), (0.5, 0.6, 0.4, 0.1)))
    soft = next(line for line in same if line.startswith("DPO, soft: **"))
    assert "not shown to be better" in soft
    assert "the moving one falls as well" in soft
    assert "a moving reference gives more gold: nowhere shown" in same
    worse = curves.verdict(made_up((0.5, 0.6, 0.62, 0.63), (0.5, 0.5, 0.3, 0.0)))
    soft = next(line for line in worse if line.startswith("DPO, soft: **"))
    assert "the fixed reference is not shown to fall" in soft
    assert "worse" in soft
    assert any(
        line.startswith("a moving reference gives less gold: DPO soft at equal KL")
        for line in worse
    )
    assert curves.verdict(made_up((0.5, 0.1), (0.5, 0.6), (0, 1), (0, 1), seeds=1)) == [
        "one seed has no interval: nothing is claimed; ask for two or more"
    ]


def test_further_along_the_same_curve_is_no_difference_at_equal_kl():
    c = curves.compare(
        made_up((0.5, 0.55, 0.6), (0.5, 0.6, 0.4), (0, 0.5, 1), (0, 1, 3)), "sigmoid", "soft"
    )
    assert c.equal_kl.mean == pytest.approx(0, abs=1e-3)
    assert c.gold_at_end.sign == -1
    assert c.kl_at_end.mean == pytest.approx(2)
    assert c.fall_moving.mean == pytest.approx(0.2, abs=0.01)


def test_overoptimization_end_to_end_and_resumed(tmp_path, monkeypatch, capsys):
    command = [
        "--out",
        str(tmp_path),
        "--losses",
        "kto_paired",
        "--beta",
        "0.5",
        "--seeds",
        "2",
        "--steps",
        "2",
        "--checkpoint_every",
        "1",
        "--pairs",
        "16",
        "--test_pairs",
        "4",
        "--samples",
        "4",
        "--batch",
        "8",
        "--width",
        "16",
        "--sft_steps",
        "3",
        "--sft_pairs",
        "64",
        "--tau",
        "1",
        "--soft_every",
        "1",
    ]
    overoptimization.main(command)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["runs"]) == 6
    assert len(found["compared"]) == 2
    row = found["runs"][0]["rows"][-1]
    assert row["step"] == 2
    assert {"gold", "kl", "kl_stderr", "length", "logps_chosen", "logratio_rejected"} <= row.keys()
    assert found["runs"][0]["rows"][0]["kl"] == 0
    assert (tmp_path / "gold-against-kl.png").exists()
    assert (tmp_path / "steps.png").exists()
    assert "the claim" in (tmp_path / "verdict.md").read_text()

    def no_more(config):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(overoptimization, "train", no_more)
    overoptimization.main(command)
    with pytest.raises(SystemExit, match="tau: 1 -> 2"):
        overoptimization.main([*command, "--tau", "2"])
