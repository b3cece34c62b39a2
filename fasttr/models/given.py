"""A loaded transformers model, made to give log-probs of packed trees, and given back as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttr.errors import FasttrError
from fasttr.models import attention, checks
from fasttr.models.load import (
    ModelConfig,
    adapter_on,
    checkpoint_activations,
    dropout_rates,
    finish_packed,
)
from fasttr.models.packed import PackedModel
from fasttr.models.probe import probe
from fasttr.models.slices import InMemory
from fasttr.packing.tiers import SHARED

_KEPT = "_fasttr_kept"


def pack_model(model: Any, config: ModelConfig | None = None) -> PackedModel:
    """Take a transformers causal LM with fp32 weights as it is in memory; it is changed in place.

    Its attention becomes the packed one, its dropout 0, and it moves to `config.device`.
    `give_back` undoes that. FasttrError for what could not be exact when packed.
    """
    config = config or ModelConfig(name="the given model", key="model", device=model.device)
    checks.check_given(model, config.key)
    probe(model.config, type(model)).require(config.tier, config.key, config.name)
    checks.check_rope(model.config, config.name, config.max_length)
    if config.quantisation is not None:
        raise FasttrError(
            "load_in_4bit: got true beside a model that is given; wanted its name, under which it "
            "is read in 4 bits"
        )
    other = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"}
    if other:
        raise FasttrError(
            f"{config.key}: got weights in {', '.join(sorted(other))}; wanted float32: call "
            "model.float(), bf16: true computes in bfloat16"
        )
    checks.check_finite(model.named_parameters(), config.key, config.name)
    model.fasttr_config = copy.deepcopy(model.config)
    setattr(model, _KEPT, _Kept(model))
    if config.tier == SHARED:
        model.set_attn_implementation(attention.register())
    adapter = adapter_on(model, config)
    if config.ranks.is_sharded:
        return finish_packed(model.train(), config, adapter, InMemory(model))
    model.to(config.device).train()
    return finish_packed(model, config, adapter)


def give_back(packed: PackedModel) -> None:
    """Make the model attend, drop and recompute as it did before it was packed."""
    model = packed.model
    kept = getattr(model, _KEPT, None)
    if kept is not None:
        kept.put_back()
        delattr(model, _KEPT)
    else:
        model.set_attn_implementation(attention.own_attention(model))


@torch.no_grad()
def read_weights_into(model: Any, folder: Path) -> None:
    """Copy the weights of a Hugging Face folder into a model of the same architecture, by name."""
    from safetensors import safe_open

    targets = model.state_dict()
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
                value = file.get_tensor(name)
                if name not in targets or targets[name].shape != value.shape:
                    raise FasttrError(
                        f"model: {folder} holds {name} of shape {tuple(value.shape)}, which the "
                        "given model lacks; wanted the architecture that the checkpoint was made "
                        "with"
                    )
                targets[name].copy_(value)
                found.add(targets[name].data_ptr())
    missing = [name for name, target in targets.items() if target.data_ptr() not in found]
    if missing:
        raise FasttrError(f"model: {folder} lacks {missing[0]}, which the given model has")


class _Kept:
    """What of a model is changed while it is packed."""

    def __init__(self, model: Any):
        self._model = model
        self._implementation = model.config._attn_implementation
        self._is_training = model.training
        self._dropouts: list[tuple[Any, str, float]] = []
        for owner in (model.config, *model.modules()):
            for name in _dropout_names(owner):
                self._dropouts.append((owner, name, getattr(owner, name)))
                setattr(owner, name, 0.0)

    def put_back(self) -> None:
        for owner, name, value in self._dropouts:
            setattr(owner, name, value)
        self._model.set_attn_implementation(self._implementation)
        checkpoint_activations(self._model, False)
        self._model.train(self._is_training)


def _dropout_names(owner: Any) -> list[str]:
    """The attributes of a module or a config that are rates of dropout above 0."""
    if isinstance(owner, nn.Dropout):
        return ["p"] if owner.p > 0 else []
    return dropout_rates(owner)
