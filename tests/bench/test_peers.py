"""fasttr beside TRL: only equal losses give numbers."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math

import pytest

from bench import peers
from bench.harness import parsed
from bench.pairs import drawn_file, model_folder, read_file, survivors
from bench.peer_results import figures_of, peers_table, verdicts
from bench.turns import Turns
from fasttr.models.load import load_tokenizer


@pytest.fixture
def lopsided(tmp_path):
    """Sides that differ in every row alike, so that the loss moves within three steps."""
    rows = [
        {
            "prompt": f"question {i}?",
            "chosen": " good" * (i % 5 + 3),
            "rejected": " bad" * (i % 4 + 3),
        }
        for i in range(12)
    ]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_peers_give_equal_losses_and_a_complete_file(tmp_path, lopsided):
    out = tmp_path / "out"
    given = ["--data", str(lopsided), "--out", str(out), "--providers", "fasttr,trl-best", "--cpu"]
    given += ["--size", "tiny", "--batch", "4", "--steps", "3", "--learning_rate", "3e-2"]
    result = peers.main(parsed(peers, *given))
    assert json.loads((out / "peers.json").read_text()) == result
    detail = json.loads((out / "peers_detail.json").read_text())
    assert detail["wrong"] == {}
    assert {*result["providers"], *detail["absent"]} == {"fasttr", "trl-best"}
    assert "fasttr" in peers_table(result, detail)
    ours = result["providers"]["fasttr"]
    assert len(ours["losses"]) == 3
    assert abs(ours["losses"][0] - math.log(2)) < 1e-5
    assert max(abs(loss - math.log(2)) for loss in ours["losses"]) > 0.05
    assert "max_tokens_per_batch" not in ours["settings"]  # given, it takes long rows in parts
    assert ours["pairs_per_second"] > 0
    assert ours["peak_bytes"] > 1 << 20
    if importlib.util.find_spec("trl") is None:
        assert "not installed" in detail["absent"]["trl-best"]
        pytest.skip("TRL is not installed: fasttr ran alone")
    trl = result["providers"]["trl-best"]
    assert max(abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True)) < 1e-3


@pytest.mark.parametrize(
    ("losses", "wrong"),
    [
        ({"trl-default": [0.0, 0.6, 0.5], "fasttr": [0.0, 0.6, 0.5]}, []),
        ({"trl-default": [0.0, 0.6, 0.5], "fasttr": [0.0, 0.6, 0.502]}, ["fasttr"]),
        ({"fasttr": [0.01, 0.6, 0.5]}, ["fasttr"]),
        ({"fasttr": [math.nan, 0.6]}, ["fasttr"]),
        ({"trl-default": [0.0, math.nan], "fasttr": [0.0, math.nan]}, ["fasttr"]),
        ({"trl-sync": [0.0, 0.6], "fasttr-soft": [0.0]}, ["fasttr-soft"]),
        ({"fasttr": []}, ["fasttr"]),
    ],
)
def test_a_provider_whose_losses_differ_is_wrong(losses, wrong):
    """The first loss is written here as what it is beyond log 2."""
    whole = {name: [math.log(2) + x[0], *x[1:]] if x else [] for name, x in losses.items()}
    assert list(verdicts(whole, 1e-3).wrong) == wrong


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "not installed: trl, datasets" in peers.absent_because("trl-best")
    assert peers.absent_because("fasttr") is None


def test_the_reference_counts_on_both_sides():
    """4 pairs a step. A sweep of 3 s is divided over 3 steps; a move of 1.5 s inside one step is
    taken out of it and divided likewise; steps bare of it take 2 s after two of warm-up."""
    turn = {"kind": "step", "cpu_seconds": 4.0, "peak_bytes": 10, "parts": {}}
    steps = [turn | {"seconds": 9.0}, turn | {"seconds": 9.0}]
    steps.append(turn | {"seconds": 3.5, "parts": {"move": 1.5}})
    sweep = {"kind": "score", "seconds": 3.0, "cpu_seconds": 6.0, "peak_bytes": 30, "parts": {}}
    spec = {"batch": 4, "rows": 12, "bf16": False, "trainer": "fasttr", "settings": {}}
    spec |= dict.fromkeys(("learning_rate", "adam_epsilon", "beta", "max_length"), 1.0)
    spec |= {"seed": 0, "device": "cpu", "threads": 2}
    run = {"turns": [sweep, *steps], "losses": [0.6] * 3, "tokenise_seconds": 1.2}
    figures, detail = figures_of(spec, run, tokens_per_pair=100.0)
    seconds_a_step = 2.0 + (3.0 + 1.5) / 3
    assert figures["pairs_per_second"] == pytest.approx(4 / seconds_a_step)
    assert figures["tokens_per_second"] == pytest.approx(400 / seconds_a_step)
    assert figures["peak_bytes"] == 30
    assert detail["pairs_per_second_with_tokenising"] == pytest.approx(
        1 / (seconds_a_step / 4 + 0.1)
    )
    assert detail["cpu_s_per_step"] == pytest.approx(4.0 + 6.0 / 3)


def test_drawn_pairs_have_the_drawn_lengths(tmp_path):
    data = drawn_file(tmp_path / "drawn.jsonl", "hh", 40)
    tokenizer = load_tokenizer(str(model_folder(tmp_path, "tiny", data)))
    rows = survivors(read_file(str(data)), tokenizer, max_length=1024, wanted=40)
    for row, tree in zip(rows.rows, rows.trees, strict=True):
        # A token that says where a prompt begins, and one that says where a completion ends.
        assert len(tree.prompt_ids) == 1 + len(row["prompt"].split())
        assert len(tree.completions[0]) == len(row["chosen"].split()) + 1


def test_a_worker_that_stops_is_named_with_its_last_line(tmp_path):
    turns = Turns()
    spec = {"out": str(tmp_path / "it"), "trainer": "nobody", "device": "cpu", "threads": 1}
    turns.run({"it": spec}, sequential=True)
    assert turns.found == {}
    assert "stopped with status 1" in turns.failed["it"]
