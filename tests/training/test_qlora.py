"""An adapter on a base whose matrices are held in 4 bits."""

from __future__ import annotations

import json

import pytest
import torch

from fasttr import TrainConfig, train
from fasttr.errors import FasttrError
from fasttr.models.load import ModelConfig, load_model
from fasttr.models.lora import AdapterConfig
from fasttr.models.quantised import Quantisation, is_quantised
from fasttr.optim.matrices import size_of
from fasttr.packing.layout import pack
from tests.runs import LOG2, Asks, run, settings, steps
from tests.tiny import random_trees

bitsandbytes = pytest.importorskip("bitsandbytes")

QLORA = {
    "use_peft": True,
    "load_in_4bit": True,
    "lora_r": 4,
    "lora_target_modules": "all-linear",
    "ref_update": "soft",
    "ref_update_every": 2,
    "max_steps": 4,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose matrices are large enough to be worth 4 bits."""
    from fasttr.models.scratch import init_model

    folder = tmp_path_factory.mktemp("base") / "model"
    init_model("llama", hidden_size=64, num_layers=2, num_heads=4, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def whole(workspace, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(workspace, folder, **QLORA, model_name_or_path=str(base))
    return folder


def test_matrices_of_layers_are_held_in_4_bits_and_nothing_else(base):
    policy = load_model(
        ModelConfig(str(base), quantisation=Quantisation(), adapter=AdapterConfig())
    )
    held = {name: p for name, p in policy.model.named_parameters() if is_quantised(p)}
    assert len(held) == 2 * 7
    assert all("_proj" in name for name in held)
    packed_bytes = sum(p.nbytes for p in held.values())
    assert packed_bytes == sum(size_of(p) for p in held.values()) / 2
    plain = load_model(ModelConfig(str(base), adapter=AdapterConfig()))
    count = sum(p.numel() for p in plain.model.parameters())
    assert sum(size_of(p) for p in policy.model.parameters()) == count


def test_it_trains_from_the_quantised_base_and_its_reference_moves(whole):
    """The base is the reference at first: bit for bit, whatever it is rounded to."""
    found = steps(whole)
    assert found[0]["loss"] == pytest.approx(LOG2, abs=1e-7)
    assert found[0]["rewards/margins"] == 0.0
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["ref/updates"] == 1
    assert all(line["grad_norm"] > 0 for line in found)


def test_log_probs_are_those_of_peft_on_transformers_own_quantised_model(base, whole):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    held = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=held, dtype=torch.float32, device_map={"": "cpu"}
    )
    # Outside of training bitsandbytes makes products in bf16 where a CPU has them.
    theirs = PeftModel.from_pretrained(theirs, whole).train()
    config = AdapterConfig(r=4, target_modules="all-linear")
    mine = load_model(ModelConfig(str(base), quantisation=Quantisation(), adapter=config))
    mine.adapter.read(whole)
    tree = random_trees([(5, 7)])[0]
    ids = torch.tensor([*tree.prompt_ids, *tree.completions[0]]).long()[None]
    logps = torch.log_softmax(theirs(input_ids=ids).logits[0, :-1].float(), -1)
    expected = logps.gather(1, ids[0, 1:, None])[4:].sum()
    assert mine.logps(pack([tree]))[0] == pytest.approx(float(expected), abs=1e-4)


def test_resumed_is_bitwise_the_uninterrupted_run(workspace, base, whole, tmp_path):
    changes = {**QLORA, "model_name_or_path": str(base), "save_strategy": "steps", "save_steps": 1}
    stopped = tmp_path / "run"
    train(TrainConfig(**settings(workspace, stopped, **changes)), callbacks=[Asks("stop", 3)])
    run(workspace, stopped, **changes, resume_from_checkpoint=True)
    a, b = whole / "adapter_model.safetensors", stopped / "adapter_model.safetensors"
    assert a.read_bytes() == b.read_bytes()
    assert json.loads((stopped / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_peft": False}, "load_in_4bit: got true without an adapter"),
        ({"merge_adapter": True}, "merge_adapter: got True with load_in_4bit"),
        ({"use_dora": True, "ref_update": "none"}, "use_dora: got True with load_in_4bit"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(workspace, tmp_path, changes, expected):
    with pytest.raises(FasttrError, match=expected):
        run(workspace, tmp_path, **{**QLORA, **changes})
