"""The memory plan of a run: printed before weights are read, obeyed, and kept by a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from fasttr import TrainConfig
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.errors import FasttrError
from fasttr.memory.plan import GIB, bytes_of
from fasttr.memory.shapes import SHAPES
from fasttr.training.memory import Room, Rows, plan_memory
from tests.runs import run, same_weights, settings, steps, stopped_run
from tests.tiny import tiny_config

CPU = torch.device("cpu")
CARD = Room("a card", 80 * GIB, 76 * GIB)


def plan_of(shape, room=CARD, rows=None, ranks=ALONE, **changes):
    config = TrainConfig(**{"bf16": True, "compile": True, **changes})
    rows = rows or Rows(longest=2048, step_tokens=64 * 2048)
    return plan_memory(config, CPU, SHAPES[shape].config(), rows, room=room, ranks=ranks)


def test_what_is_left_open_is_chosen_and_the_table_says_it(capsys):
    config, plan = plan_of("pythia-2.8b")
    choices = plan.choices
    assert plan.fits
    assert config.adam_moments == choices.moments == "fp32"
    assert config.max_tokens_per_batch == choices.tokens
    assert config.activation_memory_budget == choices.recompute.budget == 0.8
    assert config.gradient_checkpointing is False
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a card: 80.0 GiB of memory, 76.0 GiB to plan with; planned, not measured:"
    named = {line.split()[0]: line for line in lines[1:]}
    assert f"{plan.bytes.still['weights'] / GIB:.1f} GiB" in named["weights"]
    assert f"packs of {choices.tokens:,} tokens, activation_memory_budget 0.8" in lines[5]
    sizes = [float(line.split()[1]) for line in lines[1:-1]]
    assert sum(sizes) == pytest.approx(float(lines[-1].split()[2]), abs=0.3)


def test_what_is_written_is_obeyed():
    config, plan = plan_of(
        "llama-3.2-1b", adam_moments="bf16", max_tokens_per_batch=3000, gradient_checkpointing=True
    )
    assert (config.adam_moments, config.max_tokens_per_batch) == ("bf16", 3000)
    assert config.gradient_checkpointing is True
    assert config.activation_memory_budget is None
    assert plan.choices.tokens == 3000


def test_a_run_that_cannot_fit_is_refused_with_a_remedy(capsys):
    with pytest.raises(FasttrError, match=r"wanted dtype bfloat16, .* memory_budget_gib 78 goes"):
        plan_of("llama-3-8b", ref_update="soft")
    assert "which does not fit" in capsys.readouterr().out
    _, plan = plan_of("llama-3-8b", ref_update="soft", dtype="bfloat16")
    assert plan.fits
    with pytest.raises(FasttrError, match="wanted a run without adam_moments"):
        plan_of("llama-3-8b", dtype="bfloat16", adam_moments="fp32")
    with pytest.raises(FasttrError, match="wanted use_peft true, a smaller model, or a larger"):
        plan_of("llama-3-70b")
    _, adapted = plan_of("llama-3-8b", use_peft=True, ref_update="soft")
    assert adapted.fits
    assert adapted.choices.moments == "fp32"


def test_a_soft_reference_rests_where_it_is_told_to():
    rows = Rows(longest=500, step_tokens=2000)
    soft = {"ref_update": "soft", "rows": rows}
    beside, _ = plan_of("llama-3.2-1b", **soft)
    assert beside.ref_on_host is False
    away, plan = plan_of("llama-3.2-1b", **soft, ref_on_host=True)
    assert away.ref_on_host is True
    assert plan.bytes.on_host == 4 * plan.setup.sizes.parameters.all
    with pytest.raises(FasttrError, match="wanted a soft reference that rests for more than a st"):
        TrainConfig(ref_on_host=True, ref_update="soft", ref_update_every=1)


def test_rows_bind_the_size_of_packs():
    """No pack is larger than a step can be, or smaller than what must lie in one."""
    small, plan = plan_of("llama-3.2-1b", rows=Rows(longest=300, step_tokens=1200))
    assert small.max_tokens_per_batch == 1280
    assert not plan.choices.adds_packs
    tight = Room("a card", 12 * GIB, 11.4 * GIB)
    config, plan = plan_of(
        "qwen2.5-0.5b", room=tight, rows=Rows(longest=20_000, step_tokens=40_000)
    )
    assert config.max_tokens_per_batch >= 20_000


def test_a_budget_of_layers_that_are_not_compiled_is_refused():
    with pytest.raises(FasttrError, match="layers are not compiled here"):
        plan_of("llama-3.2-1b", compile=False, activation_memory_budget=0.5)
    with pytest.raises(FasttrError, match="leave one of them out"):
        TrainConfig(activation_memory_budget=0.5, gradient_checkpointing=True)


def test_on_a_cpu_nothing_is_chosen_and_a_line_says_what_is_held(capsys):
    config = TrainConfig(bf16=False)
    rows = Rows(longest=100, step_tokens=5000)
    model = tiny_config("llama", vocab_size=200_000)
    config, plan = plan_memory(config, CPU, model, rows)
    # A row over the usual 1024 stays whole, where nobody has said what there is room for.
    assert (config.adam_moments, config.max_tokens_per_batch) == ("fp32", None)
    assert config.gradient_checkpointing is True
    assert plan.room is None
    said = capsys.readouterr().out
    assert said.startswith("memory, planned: 0.")
    assert "\n  of it weights 0.05, gradients 0.05, moments 0.10\n" in said


def test_rows_that_can_be_cut_need_no_pack_of_their_length():
    """Pairs of up to 150k tokens, whose longest side with its prompt has 80k."""
    card = Room("a card", 48 * GIB, 45 * GIB)
    long = Rows(longest=150_000, step_tokens=600_000)
    with pytest.raises(FasttrError, match="wanted use_peft true, a smaller model"):
        plan_of("llama-3.2-1b", room=card, rows=long)
    config, plan = plan_of("llama-3.2-1b", room=card, rows=long._replace(uncut=80_000))
    assert plan.fits
    assert 80_000 <= config.max_tokens_per_batch < 150_000
    # Hidden states of the whole pair meet at the head.
    narrow = plan.setup._replace(widest=1)
    assert bytes_of(narrow, plan.choices).phases["head"] < plan.bytes.phases["head"]


def test_divided_weights_are_planned_as_compiled():
    """As they are on CUDA: a layer then keeps less, and has a budget."""
    eight = Ranks(world=8, shard_size=8)
    config, plan = plan_of("llama-3-8b", ranks=eight)
    assert plan.fits
    assert plan.setup.compiled
    assert config.activation_memory_budget == plan.choices.recompute.budget
    eager, slower = plan_of("llama-3-8b", ranks=eight, compile=False)
    assert eager.activation_memory_budget is None
    assert slower.choices.tokens < plan.choices.tokens or eager.gradient_checkpointing


def test_offloaded_inputs_of_layers_leave_the_card(capsys):
    common = {"max_tokens_per_batch": 8192, "memory_budget_gib": 76}
    kept, plan = plan_of("llama-3-8b", use_peft=True, gradient_checkpointing=True, **common)
    capsys.readouterr()
    moved, offloaded = plan_of("llama-3-8b", use_peft=True, activation_offloading=True, **common)
    assert kept.gradient_checkpointing is moved.gradient_checkpointing is True
    of_inputs = 8192 * 32 * 4096 * 4
    assert offloaded.bytes.offloaded == of_inputs
    assert plan.bytes.activations - offloaded.bytes.activations == of_inputs
    assert "from inputs in the host's memory (4.00 GiB)" in capsys.readouterr().out
    with pytest.raises(FasttrError, match="activation_offloading: got true with"):
        TrainConfig(activation_offloading=True, gradient_checkpointing=False)


def test_an_architecture_that_cannot_be_counted_is_said_and_trained(capsys):
    def broken(config):
        raise RuntimeError("no shapes for this")

    config, plan = plan_memory(TrainConfig(), CPU, tiny_config("llama"), Rows(), build=broken)
    assert plan is None
    assert (config.adam_moments, config.gradient_checkpointing) == ("fp32", True)
    assert capsys.readouterr().out == "memory: not planned, no shapes for this\n"


def test_the_table_comes_before_weights_are_read(workspace, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise InterruptedError

    monkeypatch.setattr("fasttr.training.models.load_model", stop)
    with pytest.raises(InterruptedError):
        run(workspace, tmp_path)
    assert "memory, planned: " in capsys.readouterr().out


def test_a_resumed_run_keeps_what_was_chosen_on_another_card(workspace, tmp_path):
    """Begun where exact moments did not fit, and resumed where they would."""
    changes = {
        "bf16": True,
        "ref_update": "soft",
        "ref_update_every": 2,
        "memory_budget_gib": small_budget(workspace),
        "save_strategy": "steps",
        "save_steps": 3,
    }
    run(workspace, tmp_path / "whole", **changes)
    chosen = json.loads((tmp_path / "whole" / "train_config.json").read_text())
    assert chosen["adam_moments"] in ("bf16", "int8")
    stopped_run(workspace, tmp_path / "resumed", 3, **changes)
    on_another = {**changes, "memory_budget_gib": 4.0, "resume_from_checkpoint": True}
    run(workspace, tmp_path / "resumed", **on_another)
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    whole, resumed = steps(tmp_path / "whole"), steps(tmp_path / "resumed")
    assert [line["loss"] for line in whole] == [line["loss"] for line in resumed]


def small_budget(workspace) -> float:
    """GiB in which the workspace's model just fits."""
    config = TrainConfig(**settings(workspace, workspace / "unused", bf16=True, ref_update="soft"))
    hf_config = config.model(CPU).read()
    for kib in range(200, 20_000, 20):
        room = Room("a card", None, kib * 1024.0)
        rows = Rows(longest=200, step_tokens=400)
        try:
            plan_memory(config, CPU, hf_config, rows, room=room)
        except FasttrError:
            continue
        return kib / 2**20
    raise AssertionError("nothing fits")
