"""The benchmark suite on toy sizes: right providers get numbers, wrong ones none, and tables show
the results."""

import argparse
import gzip
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import everything, head, lerp, peers, tables
from bench.head_providers import PROVIDERS, Output, Provider
from bench.timing import Times, peak_bytes_of

ROOT = Path(__file__).parents[2]


def options(module, *given):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(list(given))


def test_peers_give_equal_losses_and_a_complete_file(tmp_path):
    # Sides that differ in every row alike, so that the loss moves within three steps.
    rows = [
        {
            "prompt": f"question {i}?",
            "chosen": " good" * (i % 5 + 3),
            "rejected": " bad" * (i % 4 + 3),
        }
        for i in range(12)
    ]
    data = tmp_path / "pairs.jsonl.gz"
    data.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    result = peers.main(
        options(
            peers,
            "--data",
            str(data),
            "--size",
            "tiny",
            "--batch",
            "4",
            "--steps",
            "3",
            "--out",
            str(tmp_path / "out"),
            "--learning_rate",
            "3e-2",
            "--providers",
            "fasttr,trl-best",
            "--cpu",
        )
    )
    assert json.loads((tmp_path / "out" / "peers.json").read_text()) == result
    detail = json.loads((tmp_path / "out" / "peers_detail.json").read_text())
    assert detail["wrong"] == {}
    assert set(result["providers"]) | set(detail["absent"]) == {"fasttr", "trl-best"}
    assert "fasttr" in tables.peers_table(result, detail)
    for figures in result["providers"].values():
        assert set(figures) == {
            "settings",
            "pairs_per_second",
            "tokens_per_second",
            "peak_bytes",
            "losses",
        }
        assert len(figures["losses"]) == 3
        assert abs(figures["losses"][0] - math.log(2)) < 1e-5
        assert figures["pairs_per_second"] > 0
        assert figures["peak_bytes"] > 1 << 20
    losses = [figures["losses"] for figures in result["providers"].values()]
    assert max(abs(x - math.log(2)) for x in losses[0]) > 0.05
    if importlib.util.find_spec("trl") is None:
        assert "not installed" in detail["absent"]["trl-best"]
        pytest.skip("TRL is not installed: fasttr ran alone")
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


def test_a_provider_whose_losses_differ_is_wrong_and_one_that_is_absent_is_named(monkeypatch):
    right = [math.log(2), 0.6, 0.5]
    assert peers._wrong({"trl-default": right, "fasttr": right}) == {}
    assert list(peers._wrong({"trl-default": right, "fasttr": [math.log(2), 0.6, 0.502]})) == [
        "fasttr"
    ]
    assert list(peers._wrong({"fasttr": [0.7, 0.6, 0.5]})) == ["fasttr"]
    assert list(peers._wrong({"fasttr": [math.nan, 0.6]})) == ["fasttr"]
    assert list(peers._wrong({"trl-sync": right, "fasttr-soft": right[:2]})) == ["fasttr-soft"]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "not installed: trl, datasets" in peers._absent("trl")
    assert peers._absent("fasttr") is None


def one_case(tmp_path, *more):
    args = options(
        head,
        "--shapes",
        "tiny",
        "--tokens",
        "64",
        "--seconds",
        "0.05",
        "--out",
        str(tmp_path),
        "--cpu",
        "--dtype",
        "float32",
        "--inputs",
        "peaked",
        "--reference",
        "with",
        *more,
    )
    return head.main(args)["cases"][0]


def test_a_wrong_head_gets_no_number(tmp_path, monkeypatch):
    def half(p):
        out = PROVIDERS["eager"].call(p)
        return Output(
            out.loss * 0.5 + out.loss.detach() * 0.5, out.logp
        )  # the right loss with half the gradient

    def shifted(p):
        out = PROVIDERS["eager"].call(p)
        return Output(out.loss, out.logp + 0.5)

    monkeypatch.setitem(PROVIDERS, "half a gradient", Provider(half, "preference", 3))
    monkeypatch.setitem(PROVIDERS, "shifted", Provider(shifted, "preference", 3))
    case = one_case(
        tmp_path, "--providers", "fasttr,fasttr linear_logprob,half a gradient,shifted,TRL,QuACK"
    )
    assert set(case["wrong"]) == {"half a gradient", "shifted"}
    assert {"fasttr", "fasttr linear_logprob", "TRL"} <= set(case["providers"]) | set(
        case["absent"]
    )
    assert "fasttr" in case["providers"]
    assert "QuACK" in case["absent"]
    assert 1.0 < case["entropy"] < 2.0
    assert "wrong: d_hidden" in tables.head_table(case)


def test_the_lerps_are_held_to_fp64(tmp_path, monkeypatch):
    monkeypatch.setitem(
        lerp.PROVIDERS, "wrong", lerp.Provider(lambda r, p, _: [x.mul_(1.1) for x in r])
    )
    args = options(lerp, "--models", "tiny", "--seconds", "0.05", "--out", str(tmp_path), "--cpu")
    cases = lerp.main(args)["cases"]
    assert [set(case["wrong"]) for case in cases] == [{"wrong"}] * 3
    assert "fasttr, split" in cases[0]["providers"]
    assert "torch._foreach_lerp_" in cases[1]["absent"]
    assert all(case["providers"]["fasttr"]["gb_per_s"] > 0 for case in cases)
    assert "share of the copy" in tables.lerp_table(cases[0])


def test_every_setting_of_the_ablation_has_the_padded_loss(tmp_path):
    from bench import step

    args = options(
        step,
        "--lengths",
        "tiny",
        "--size",
        "tiny",
        "--pairs",
        "4",
        "--seconds",
        "0.1",
        "--least",
        "1",
        "--settings",
        ",".join(step.SETTINGS[:6]),
        "--out",
        str(tmp_path),
        "--cpu",
    )
    case = step.main(args)["cases"][0]
    assert list(case["settings"]) == list(step.SETTINGS[:6])
    assert case["wrong"] == case["absent"] == {}


def test_all_within_a_small_budget_leaves_partial_results(tmp_path):
    # In a process of its own, as it is used: it starts others and may have to stop them.
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench",
            "all",
            "--budget",
            "10s",
            "--tiny",
            "--cpu",
            "--out",
            str(tmp_path),
        ],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "cut off" in text or "not started" in text
    assert json.loads((tmp_path / "lerp" / "lerp.json").read_text())["cases"]
    assert json.loads((tmp_path / "environment.json").read_text())["versions"]["torch"]


@pytest.mark.parametrize(
    ("page", "names"), zip(tables.PAGES, (list(tables.NAMES), ["headline"]), strict=True)
)
def test_the_tables_of_the_readmes_are_those_of_the_results(page, names):
    text = page.read_text()
    assert [m[1] for m in tables._MARKED.findall(text)] == names
    assert tables.regenerate(text, tables.RESULTS) == text, "run python -m bench tables"


def test_an_edited_table_is_found_and_a_gpu_that_never_ran_is_said(tmp_path):
    args = options(
        lerp,
        "--models",
        "tiny",
        "--cases",
        "fp32 <- fp32",
        "--seconds",
        "0.02",
        "--out",
        str(tmp_path / "cpu-2-core"),
        "--cpu",
    )
    lerp.main(args)
    text = tables.regenerate("<!-- bench:lerp -->\n<!-- /bench -->", tmp_path)
    assert "fp32 <- fp32" in text
    assert tables.NOT_MEASURED in text
    assert tables.regenerate(text.replace("fp32 <- fp32", "fp64"), tmp_path) == text


def test_budgets_and_unknown_commands():
    assert [everything.seconds(t) for t in ("9m", "240s", "1h", "30")] == [
        540.0,
        240.0,
        3600.0,
        30.0,
    ]
    with pytest.raises(argparse.ArgumentTypeError, match="wanted a time"):
        everything.seconds("soon")
    with pytest.raises(SystemExit):
        command.main(["nothing"])


def test_peak_memory_counts_what_a_call_holds_at_once():
    def call():
        a = torch.zeros(1 << 20)  # 4 MiB
        b = a + 1
        del a
        return (b + 1).sum()

    assert 8 << 20 <= peak_bytes_of(call, torch.device("cpu")) < 9 << 20


def test_medians_and_percentiles():
    assert Times.of([float(i) for i in range(11)]) == Times(5.0, 2.0, 8.0, 11)
