"""Sizes that are counted without storage are those of real models: their weights, and what autograd
keeps of a real pack."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from fasttr.memory.activations import Recompute, kept_bytes, offloaded_bytes
from fasttr.memory.sizes import sizes_of
from fasttr.models.compiled import budgeted, layers_of
from fasttr.models.halves import round_matrices
from fasttr.models.load import checkpoint_activations
from fasttr.models.lora import AdapterConfig, add_adapter, store_frozen_in_bf16
from fasttr.models.packed import PackedModel
from fasttr.optim.matrices import matrices
from fasttr.packing.layout import pack
from tests.tiny import packed_tiny, random_trees, tiny_config

SHAPES = [(90, 31, 44), (57, 62, 23), (120, 40, 44)]  # 511 tokens


def kept_by_autograd(model: PackedModel) -> float:
    """Bytes a token that a forward pass of a real model leaves."""
    batch = pack(random_trees(SHAPES))
    tokens = len(batch.input_ids)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and any(n and n % tokens == 0 for n in x.shape):
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), model.autocast():
        # What is returned keeps all that was saved alive.
        hidden = model.hidden_states(batch)
    assert hidden.requires_grad
    return sum(found.values()) / tokens


def meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def in_bf16(model: PackedModel) -> PackedModel:
    round_matrices(model.model)
    model.bf16 = True
    return model


def with_experts_in_bf16(*archs: str) -> list[tuple[str, bool]]:
    """Each architecture in both dtypes; of experts in fp32 torch has no shapes."""
    return [*((arch, bf16) for arch in archs for bf16 in (True, False)), ("gpt_oss", True)]


def test_experts_in_fp32_cannot_be_counted():
    with pytest.raises(RuntimeError, match="dtype"):
        sizes_of(tiny_config("gpt_oss"), bf16=False)


@pytest.mark.parametrize(
    ("arch", "bf16"),
    with_experts_in_bf16("llama", "qwen3", "gemma2", "gpt_neox", "olmo2", "phi3", "cohere"),
)
def test_kept_bytes_are_those_of_autograd(arch, bf16):
    model = packed_tiny(arch)
    sizes = sizes_of(tiny_config(arch), bf16=bf16)
    model = in_bf16(model) if bf16 else model
    counted = kept_bytes(sizes, Recompute(compiled=False))
    assert counted == pytest.approx(kept_by_autograd(model), rel=0.03)


@pytest.mark.parametrize(("arch", "rotary"), [("llama", 8), ("gemma2", 8), ("gpt_neox", 2)])
def test_with_checkpointing_a_layer_keeps_its_input(arch, rotary):
    model = in_bf16(packed_tiny(arch))
    sizes = sizes_of(tiny_config(arch), bf16=True)
    whole = kept_by_autograd(model)
    checkpoint_activations(model.model, True)
    kept = kept_by_autograd(model)
    assert kept < whole / 3
    counted = kept_bytes(sizes, Recompute(compiled=False, whole_layers=True))
    # Cosines and sines are arguments of a layer, which autograd's hooks do not see then.
    assert counted == pytest.approx(kept + 2 * 4 * rotary, rel=0.01)


def test_offloading_takes_the_inputs_of_all_layers_and_changes_no_gradient(monkeypatch):
    moved: list[int] = []

    def on_cpu(pin_memory: bool) -> Any:
        def note(x: torch.Tensor) -> torch.Tensor:
            moved.append(x.data_ptr())
            return x.clone()

        assert not pin_memory
        return torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", on_cpu)
    batch = pack(random_trees(SHAPES))
    inputs: list[torch.Tensor] = []
    found = []
    for offloads in (False, True):
        model = packed_tiny("llama")
        checkpoint_activations(model.model, True)
        for layer in layers_of(model):
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        model.offloads = offloads
        model.hidden_states(batch).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    of_layers = inputs[-2:]
    assert {x.data_ptr() for x in of_layers} <= set(moved)
    counted = offloaded_bytes(
        sizes_of(tiny_config("llama"), bf16=False),
        Recompute(compiled=False, whole_layers=True, offloads=True),
    )
    assert counted * len(batch.input_ids) == sum(x.nbytes for x in of_layers)


@pytest.mark.parametrize(
    ("budget", "tolerance"),
    [(1.0, 0.05), (0.8, 0.1), pytest.param(0.4, 0.15, marks=pytest.mark.slow)],
)
def test_a_compiled_layer_keeps_what_the_partitioner_leaves(budget, tolerance):
    """Widths at which the residual stream is no larger part than in real models."""
    wide = {"hidden_size": 128, "intermediate_size": 448}
    torch._dynamo.reset()
    model = in_bf16(packed_tiny("llama", **wide))
    backend = budgeted("aot_eager_decomp_partition", budget)
    for layer in layers_of(model):
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    sizes = sizes_of(tiny_config("llama", **wide), bf16=True)
    counted = kept_bytes(sizes, Recompute(compiled=True, budget=budget))
    assert counted == pytest.approx(kept_by_autograd(model), rel=tolerance)


@pytest.mark.parametrize(
    ("arch", "bf16"), with_experts_in_bf16("llama", "qwen3", "gemma2", "gpt_neox")
)
def test_weights_are_those_that_a_run_splits(arch, bf16):
    """Counted on the meta device, at full depth."""
    model = meta_model(tiny_config(arch))
    counted = sizes_of(tiny_config(arch), bf16=bf16).parameters
    split = sum(p.numel() for p in matrices(model))
    assert counted.split == split > 0
    assert counted.trained == sum(p.numel() for p in model.parameters())
    assert counted.all == counted.trained


def test_layers_of_a_deep_model_are_counted_by_kind():
    """A layer of each kind stands for all of them: windows in five of six layers."""
    deep = tiny_config("gemma3_text", num_hidden_layers=12, layer_types=None)
    sizes = sizes_of(deep, bf16=True)
    assert sizes.layers == 12
    assert sorted(kind.layers for kind in sizes.kinds) == [2, 10]
    assert sizes.parameters.all == sum(p.numel() for p in meta_model(deep).parameters())


def test_an_adapter_and_its_base_are_counted_as_a_run_holds_them():
    adapter = AdapterConfig(r=4, target_modules="all-linear")
    counted = sizes_of(tiny_config("llama"), bf16=True, adapter=adapter).parameters
    model = packed_tiny("llama").model
    add_adapter(model, adapter, "tiny")
    store_frozen_in_bf16(model)
    named = dict(model.named_parameters())
    trained = sum(p.numel() for p in named.values() if p.requires_grad)
    assert counted.trained == counted.low_rank == trained > 0
    halves = sum(p.numel() for p in named.values() if p.dtype == torch.bfloat16)
    assert counted.frozen_half == halves > 0
    assert counted.all == sum(p.numel() for p in named.values())


def test_a_token_meets_the_matrices_of_dense_layers_and_some_of_experts():
    llama = sizes_of(tiny_config("llama"), bf16=True)
    per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert llama.product_weights == 2 * per_layer
    assert llama.attention_width == 2 * 2 * 4 * 8  # two products of 4 heads of 8 in 2 layers
    experts = sizes_of(tiny_config("qwen3_moe"), bf16=True)
    router = 32 * 4
    of_two_experts = 2 * 3 * 32 * 16
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert experts.product_weights == 2 * (attention + router + of_two_experts)
