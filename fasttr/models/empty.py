"""A model without values: for processes that each read their own rows of its files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttr.distributed.ranks import Ranks
from fasttr.models.slices import ByAlias, InFiles


def empty_model(hf_config: Any, attention: str | None, trust_remote_code: bool) -> Any:
    """A transformers causal LM in fp32 whose parameters are on the device `meta`. Its buffers are
    real: what is computed at the start, such as rotary frequencies, is in no file."""
    from transformers import AutoModelForCausalLM

    arguments = {} if attention is None else {"attn_implementation": attention}
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=torch.float32, trust_remote_code=trust_remote_code, **arguments
        )
    model.tie_weights()
    return model


def make_room(model: nn.Module) -> None:
    """Put empty tensors on the host in the place of parameters on `meta`, which no adapter can be
    put beside. The system gives memory to what is written alone."""
    rooms: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not p.is_meta:
                continue
            if p not in rooms:
                empty = torch.empty(p.shape, dtype=p.dtype)
                rooms[p] = nn.Parameter(empty, requires_grad=p.requires_grad)
            module.register_parameter(name, rooms[p])


def files_of(name: str, revision: str, model: nn.Module, ranks: Ranks) -> ByAlias | None:
    """The files of a folder or a hub id, where they hold every parameter under its own name and
    shape; None where transformers has to convert them."""
    folder = ranks.first_alone(lambda: _folder(name, revision))
    found = ByAlias(InFiles(folder), model)
    return None if found.missing else found


def _folder(name: str, revision: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"])
    )


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, a parameter that a module takes is moved to `meta`: what fills it then does
    nothing."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        if p is not None and not p.is_meta:
            p = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
        register(module, name, p)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
