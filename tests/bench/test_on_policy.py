"""The benchmark of steps on given completions: both sides compute the same, then are timed."""

import bench.on_policy
from bench.harness import parsed


def test_both_sides_agree_and_are_timed(tmp_path):
    small = [
        "--shapes",
        "12:6",
        "--width",
        "32",
        "--vocab",
        "270",
        "--completions",
        "4",
        "--seconds",
        "0.1",
        "--cpu",
    ]
    args = parsed(bench.on_policy, *small, "--out", str(tmp_path))
    found = bench.on_policy.BENCHMARK.run(args)["cases"]
    assert [case["kind"] for case in found] == ["reward", "grpo", "rloo", "scoring", "update"]
    for case in found:
        assert case["wrong"] == case["absent"] == {}
        assert set(case["times"]) == {"fasttr", "trl"}
        assert case["tokens_packed"] < case["tokens_padded"]
        assert case["faster"]["calls"] == case["times"]["fasttr"]["calls"]
    assert found[1]["tokens_packed"] < 0.6 * found[1]["tokens_padded"]


def test_another_gradient_is_called_wrong():
    ours = bench.on_policy.Outcome(loss=1.0, gradient_norm=2.0)
    assert ours.agrees(bench.on_policy.Outcome(1.00001, 2.0)) == ""
    told = ours.agrees(bench.on_policy.Outcome(1.0, 2.1))
    assert told == "gradient_norm 2, TRL's 2.1"
