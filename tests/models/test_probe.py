"""What the probe of an architecture finds, and what a run makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig

from fasttr.errors import FasttrError
from fasttr.models import probe as probe_module
from fasttr.models.choice import Candidate, choose_tier
from fasttr.models.load import ModelConfig, load_model
from fasttr.models.probe import probe
from fasttr.models.small import smallest_window
from tests.runs import run, steps
from tests.tiny import tiny_config, tiny_model


@pytest.fixture
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(probe_module, "FOUND", {})


@pytest.mark.usefixtures("_nothing_remembered")
@pytest.mark.parametrize("wrong", [1, -1])
def test_a_window_that_is_one_token_off_is_noticed(monkeypatch, wrong):
    """What may differ follows from rounding: far less than one token more or less makes."""
    attend = probe_module.attention.packed_attention

    def off_by_one(*args, sliding_window=None, **kwargs):
        window = None if sliding_window is None else sliding_window + wrong
        return attend(*args, sliding_window=window, **kwargs)

    monkeypatch.setattr(probe_module.attention, "packed_attention", off_by_one)
    support = probe(tiny_config("mistral"))
    assert support.tiers["shared"].limit == 0
    assert support.best() == "packed"
    assert "is off by" in support.tiers["shared"].reason


def test_loaded_weights_are_held_to_their_own_forward(workspace, monkeypatch):
    """Exact when it was probed, and then without what comes before a token."""
    load_model(ModelConfig(str(workspace / "model")))
    attend = probe_module.attention.packed_attention

    def of_one_token(*args, sliding_window=None, **kwargs):
        return attend(*args, sliding_window=1, **kwargs)

    monkeypatch.setattr(probe_module.attention, "packed_attention", of_one_token)
    with pytest.raises(FasttrError, match=r"in the tier shared differ by .* own padded forward"):
        load_model(ModelConfig(str(workspace / "model")))
    load_model(ModelConfig(str(workspace / "model"), tier="padded"))


def test_a_window_that_only_the_mask_knows_bounds_the_length():
    config = tiny_config("llama4_text", attention_chunk_size=64)
    support = probe(config)
    assert smallest_window(config) == 64
    assert support.tiers["shared"].limit == 64
    assert support.best(64) == "shared"
    assert support.best(65) == "packed"
    assert support.tiers["padded"].limit == math.inf


def test_a_model_that_sees_what_comes_is_refused():
    config = AutoConfig.for_model("bert", hidden_size=32, num_attention_heads=4)
    assert "the tokens after it" in str(probe(config).refusal)


def test_random_numbers_of_a_run_do_not_depend_on_the_probe():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    probe(tiny_config("llama", hidden_size=48))
    assert torch.equal(torch.rand(4), want)
    assert torch.get_default_dtype() == torch.float32


def test_models_share_the_tier_that_is_exact_for_all():
    shared, padded = (Candidate.given(tiny_model(arch)) for arch in ("llama", "lfm2"))
    assert choose_tier("auto", [shared], 50).tier == "shared"
    assert choose_tier("packed", [shared], 50).tier == "packed"
    choice = choose_tier("auto", [shared, padded], 50)
    assert choice.tier == "padded"
    assert "a prompt cannot be shared: a small random lfm2 is off by" in choice.reason
    with pytest.raises(FasttrError, match="got shared with the given model, and a small random"):
        choose_tier("shared", [shared, padded], 50)


def test_learned_positions_end_with_their_table():
    gpt2 = Candidate.given(tiny_model("gpt2"))
    assert choose_tier("auto", [gpt2], 128).tier == "shared"
    with pytest.raises(FasttrError, match=r"longest row has 129 tokens .* has 128 positions"):
        choose_tier("auto", [gpt2], 129)


def test_a_forced_tier_trains_alike_and_says_its_cost(workspace, tmp_path, capsys):
    logs = {}
    for tier in ("auto", "packed", "padded"):
        run(workspace, tmp_path / tier, attention_tier=tier, learning_rate=1e-3)
        logs[tier] = steps(tmp_path / tier)
    shown = capsys.readouterr().out
    assert "attention_tier: shared (a small random llama is off by" in shown
    assert "attention_tier: padded (asked for); " in shown
    assert "times the tokens of shared prompts" in shown
    for tier in ("packed", "padded"):
        for one, other in zip(logs["auto"], logs[tier], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert logs["padded"][-1]["perf/padding_fraction"] > 0
