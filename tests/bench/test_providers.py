"""Every benchmark holds its providers to the truth before a clock runs, on toy sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import attention, head, layer, lerp, optim, step
from bench.baselines import packed_alone, packed_shared
from bench.gpu.predictions import PREDICTIONS
from bench.harness import Case, parsed
from bench.head_problem import LEAVES, make_problem, ragged_lengths
from bench.head_providers import PROVIDERS as HEADS
from bench.head_providers import Attempt, Output, Provider, gradients
from bench.lengths import make_trees, packed_tokens, trees_filling

CPU = torch.device("cpu")


def cases_of(module, tmp_path, *given: str) -> list[Case]:
    return module.BENCHMARK.run(parsed(module, *given, "--out", str(tmp_path), "--cpu"))["cases"]


TOY_HEAD = ("--shapes", "tiny", "--tokens", "64", "--seconds", "0.05", "--inputs", "peaked")


def test_a_wrong_head_gets_no_number(tmp_path, monkeypatch):
    def half(p):
        eager = HEADS["eager"].prepare(p)

        def forward():
            loss, logp = eager.forward()
            return Output(0.5 * loss + 0.5 * loss.detach(), logp)  # half of the gradient

        return Attempt(forward, eager.hidden)

    def shifted(p):
        eager = HEADS["eager"].prepare(p)

        def forward():
            loss, logp = eager.forward()
            return Output(loss, logp + 0.5)

        return Attempt(forward, eager.hidden)

    monkeypatch.setitem(HEADS, "half a gradient", Provider(half, "preference", 3))
    monkeypatch.setitem(HEADS, "shifted", Provider(shifted, "preference", 3))
    names = "fasttr,fasttr linear_logprob,half a gradient,shifted,TRL,Liger chunked DPO,QuACK"
    given = (*TOY_HEAD, "--reference", "with", "--leaves", "fp32", "--providers", names)
    (case,) = cases_of(head, tmp_path, *given)
    assert set(case["wrong"]) == {"half a gradient", "shifted"}
    assert "dX" in head.table(case)
    assert "wrong: d_hidden" in head.table(case)
    assert {"fasttr", "fasttr linear_logprob"} <= set(case["providers"])
    # The peers may be installed or not; where they are, they are right.
    assert {"TRL", "Liger chunked DPO", "QuACK"} <= {*case["providers"], *case["absent"]}
    assert 1.0 < case["entropy"] < 2.0


@pytest.mark.parametrize("leaf", ["fp32-autocast", "fp32-autocast-later"])
def test_heads_take_fp32_leaves_under_autocast_and_a_second_micro_batch(tmp_path, leaf):
    names = "fasttr,fasttr into .grad,eager"
    given = (*TOY_HEAD, "--reference", "without", "--leaves", leaf, "--providers", names)
    (case,) = cases_of(head, tmp_path, *given)
    assert case["wrong"] == {}
    assert case["dtype"] == "bfloat16"
    later = {"fasttr into .grad"} if leaf.endswith("later") else set()
    assert set(case["providers"]) == {"fasttr", "eager"} | later


def test_a_later_micro_batch_adds_to_the_gradient_that_is_there():
    problem = make_problem(60, 16, 40, device=CPU, leaf=LEAVES["fp32-later"])
    attempt = HEADS["fasttr"].prepare(problem)
    first = gradients(attempt, problem).weight
    attempt.forward().loss.backward()
    torch.testing.assert_close(problem.weight.grad, 2 * first)


def test_completions_have_unequal_lengths_and_fill_the_rows():
    lengths = ragged_lengths(8192)
    assert sum(lengths) == 8192
    assert len(lengths) % 2 == 0
    assert len(set(lengths)) > len(lengths) // 2
    assert 4096 not in np.cumsum(lengths)


def test_the_lerps_are_held_to_fp64(tmp_path, monkeypatch):
    wrong = lerp.Provider(lambda w: [x.mul_(1.1) for x in w.references])
    monkeypatch.setitem(lerp.PROVIDERS, "wrong", wrong)
    cases = cases_of(lerp, tmp_path, "--models", "tiny", "--seconds", "0.02")
    assert [set(case["wrong"]) for case in cases] == [{"wrong"}] * 3
    assert "fasttr, split" in cases[0]["providers"]
    assert "torch._foreach_lerp_" in cases[1]["absent"]
    assert "share of the copy" in lerp.table(cases[0])


def test_the_optimizers_are_held_to_fp64(tmp_path, monkeypatch):
    """A step with the wrong decay of the second moment is off by a tenth of its way."""

    def hurried(parameters):
        return torch.optim.AdamW(parameters, **{**optim.SETTINGS, "eps": 0.1})

    monkeypatch.setitem(optim.PROVIDERS, "torch hurried", optim.Provider(hurried, 28, 1e-3))
    (case,) = cases_of(optim, tmp_path, "--models", "tiny", "--seconds", "0.02")
    assert set(case["wrong"]) == {"torch hurried"}
    assert {"torch fused", "torch foreach"} <= set(case["providers"])
    assert {"torchao AdamW8bit", "flashoptim FlashAdamW"} <= {*case["providers"], *case["absent"]}
    fused = case["providers"]["torch fused"]
    assert fused["state_bytes"] >= 8 * case["parameters"]
    assert fused["bytes"] == 28 * case["parameters"]


def test_attention_is_held_to_fp32_and_grouped_heads_count(tmp_path, monkeypatch):
    def acausal(inputs):
        return attention.PROVIDERS["fasttr, segments"].attend(inputs).flip(1)

    monkeypatch.setitem(attention.PROVIDERS, "acausal", attention.Provider(acausal))
    given = ("--tokens", "96", "--lengths", "tiny", "--heads", "4/2x16", "--seconds", "0.05")
    (case,) = cases_of(attention, tmp_path, *given)
    assert set(case["wrong"]) == {"acausal"}
    assert {"fasttr, segments", "segments without sharing", "padded"} <= set(case["providers"])


def test_every_mode_of_a_layer_has_one_output_and_gradient(tmp_path, monkeypatch):
    eager = layer.Layers.split

    def wrong(self, budget):
        call = eager(self)
        return call._replace(layer=lambda *args, **kwargs: 2 * call.layer(*args, **kwargs))

    monkeypatch.setattr(layer.Layers, "compiled", wrong)
    given = ("--archs", "tiny", "--tokens", "64", "--lengths", "tiny", "--seconds", "0.02")
    (case,) = cases_of(layer, tmp_path, *given)
    assert set(case["modes"]) == {"fp32", "split", "bf16"}
    assert set(case["wrong"]) == {"compiled", "compiled@0.8"}
    kept = {name: row["kept_bytes"] for name, row in case["modes"].items()}
    assert kept["bf16"] < kept["split"] < kept["fp32"]
    assert case["modes"]["fp32"]["kinds"]["products"]["ms"] > 0


def test_every_line_of_the_ablation_has_the_padded_loss(tmp_path):
    lines = step.LINES[:6]
    given = ["--lengths", "tiny", "--size", "tiny", "--pairs", "4", "--seconds", "0.02"]
    (case,) = cases_of(step, tmp_path, *given, "--least", "1", "--settings", ",".join(lines))
    assert tuple(case["settings"]) == lines
    assert case["wrong"] == case["absent"] == {}


def test_packs_of_the_ablation_repeat_prompts_or_share_them():
    trees = make_trees("tiny", 6, 100)
    repeated = sum(len(batch.input_ids) for batch in packed_alone(trees, 64))
    shared = sum(len(batch.input_ids) for batch in packed_shared(trees, 64))
    assert repeated == sum(2 * len(t.prompt_ids) + sum(map(len, t.completions)) for t in trees)
    assert shared == sum(len(t.prompt_ids) + sum(map(len, t.completions)) for t in trees)


def test_a_line_with_another_loss_gets_no_number(tmp_path, monkeypatch):
    from bench import ablation

    monkeypatch.setattr(ablation, "REFERENCE_NOISE", 0.5)
    monkeypatch.setattr(ablation.baselines, "dpo_sum", lambda logp, ref, beta: logp.sum())
    given = ["--lengths", "tiny", "--size", "tiny", "--pairs", "4", "--seconds", "0.02"]
    (case,) = cases_of(
        step, tmp_path, *given, "--least", "1", "--settings", "padded,packed,fused loss"
    )
    assert set(case["wrong"]) == {"fused loss"}
    assert set(case["settings"]) == {"padded", "packed"}


def test_drawn_lengths_are_those_of_the_data_set():
    trees = make_trees("hh", 2000, 100)
    assert 90 < np.median([len(tree.prompt_ids) for tree in trees]) < 130
    filled = trees_filling("hh", 4096, 100)
    assert 3000 < sum(packed_tokens(tree) for tree in filled) <= 4096
    assert len(trees_filling("hh", 8, 100)) == 1


def test_predictions_name_figures_of_parts_that_exist():
    from bench.gpu.plan import BY_NAME

    assert {part for part, _ in PREDICTIONS} <= set(BY_NAME)
