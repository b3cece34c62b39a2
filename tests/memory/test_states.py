"""Bytes of weights, gradients and moments are those of the tensors that the real classes make."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasttr.memory import states
from fasttr.memory.sizes import sizes_of
from fasttr.memory.states import Storage
from fasttr.optim.adamw import OptimizerConfig
from fasttr.optim.named import OPTIMIZERS, state_tensors
from fasttr.optim.update import MasterAdamW
from tests.tiny import tiny_config, tiny_model

WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 640}


def on_meta(**overrides):
    with torch.device("meta"):
        config = copy.deepcopy(tiny_config("llama", **WIDE, **overrides))
        return AutoModelForCausalLM.from_config(config)


def nbytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_bytes_of_split_weights_are_those_of_the_optimizer(moments, masters, tied):
    """No step is made: SplitAdamW makes its states at once, on the meta device too."""
    model = on_meta(tie_word_embeddings=tied)
    config = OptimizerConfig(moments=moments, keeps_masters=masters)
    optimizer = config.optimizer(model, bf16=True)
    assert isinstance(optimizer, MasterAdamW)
    held = sizes_of(tiny_config("llama", **WIDE, tie_word_embeddings=tied), bf16=True).parameters
    storage = Storage(
        bf16=True,
        is_adamw=True,
        keeps_masters=masters,
        state_bytes=states.MOMENT_BYTES[moments],
    )
    made = [state for state in optimizer.state.values()]
    remainders = [state["remainder"] for state in made if "remainder" in state]
    found = nbytes(model.parameters()) + nbytes(remainders)
    assert states.weight_bytes(held, storage) == found
    moment_tensors = [
        x for state in made for name, x in state.items() if name not in ("remainder", "step")
    ]
    assert states.state_bytes(held, storage) == pytest.approx(nbytes(moment_tensors), rel=1e-3)
    for packs in (1, 2):
        gradients = gradients_of_a_step(model, optimizer, packs)
        counted = states.gradient_bytes(held, storage._replace(adds_packs=packs > 1))
        assert counted == nbytes(gradients)


def gradients_of_a_step(model, optimizer, packs):
    """As autograd leaves them: of a weight's dtype, or added to the fp32 buffer that is there."""
    for p in model.parameters():
        p.grad = None
    optimizer.begin_step(packs)
    return [p.grad if p.grad is not None else p for p in model.parameters()]


@pytest.mark.parametrize("name", [*states.STATE_BYTES, "adamw_torch"])
def test_bytes_of_other_optimizers_are_those_of_a_first_step(name):
    if OPTIMIZERS[name].package is not None:
        pytest.importorskip(OPTIMIZERS[name].package)
    model = tiny_model("llama", **WIDE)
    arguments = "momentum=0.9,centered=true" if name == "rmsprop" else None
    optimizer = OptimizerConfig(name=name, arguments=arguments).optimizer(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sizes_of(tiny_config("llama", **WIDE), bf16=False).parameters
    expected = states.MOMENT_BYTES["fp32"]
    if name in states.STATE_BYTES:
        given = {"momentum": 0.9, "centered": True} if arguments else {}
        expected = states.bytes_of_optimizer(name, given)
    storage = Storage(bf16=False, is_adamw=False, state_bytes=expected)
    found = nbytes(x for key, x in state_tensors(optimizer).items() if not key.endswith("step"))
    # Adafactor keeps a number a row and a column.
    assert states.state_bytes(held, storage) == pytest.approx(found, rel=0.01, abs=4e4)
    assert states.weight_bytes(held, storage) == nbytes(model.parameters())


def test_a_shard_holds_its_part_and_a_soft_reference_four_bytes_a_weight():
    held = sizes_of(tiny_config("llama", **WIDE), bf16=True).parameters
    whole = Storage(bf16=True, is_adamw=True)
    part = whole._replace(shard=8)
    for bytes_of in (states.weight_bytes, states.gradient_bytes, states.state_bytes):
        assert bytes_of(held, part) == bytes_of(held, whole) / 8
    assert states.soft_reference_bytes(held) == 4 * held.trained
    assert states.visit_bytes(held, whole) == 2 * held.split + 4 * held.whole
