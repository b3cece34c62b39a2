"""What a model is made of and keeps for its backward, counted on tensors without storage.

A copy of the model with a layer of each kind is made under torch's FakeTensorMode: every shape and
dtype is that of the real one, no byte is held and no weight is read. A forward pass of it shows
what autograd would keep.

Legend: T tokens of the pack that is tried, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fasttr.batch import PackedBatch, Tree
from fasttr.memory.watch import Kept, Watch
from fasttr.models import attention, lora, small
from fasttr.models.packed import PackedModel
from fasttr.optim.matrices import matrices
from fasttr.packing.layout import pack
from fasttr.packing.tiers import SHARED

TOKENS = 509  # T: a prime, so that a dimension of this size is one of tokens


class Parameters(NamedTuple):
    """Numbers of weights, by how a run holds them."""

    split: int = 0  # trained matrices that are bf16 under bf16 compute
    whole: int = 0  # all else that is trained: fp32
    frozen_half: int = 0  # frozen matrices that are bf16 under bf16 compute
    frozen_whole: int = 0  # all else that is frozen: fp32
    low_rank: int = 0  # of those that are trained, the factors of adapters

    @property
    def trained(self) -> int:
        return self.split + self.whole

    @property
    def all(self) -> int:
        return self.trained + self.frozen_half + self.frozen_whole

    def times(self, count: int) -> Parameters:
        return Parameters(*(count * number for number in self))

    def plus(self, other: Parameters) -> Parameters:
        return Parameters(*(a + b for a, b in zip(self, other, strict=True)))


class LayerKind(NamedTuple):
    """Decoder layers that are alike."""

    layers: int
    parameters: Parameters  # of one
    product_weights: int  # weights of one that a token is multiplied with
    kept: Kept  # bytes a token that one keeps for the backward


class ModelSizes(NamedTuple):
    """A model by its kinds of layers, and what lies outside them."""

    kinds: tuple[LayerKind, ...]
    outside: Parameters  # embeddings, last norm, head
    kept_outside: int  # bytes a token that these keep
    hidden: int  # D
    vocabulary: int  # V
    head_weights: int  # V D, or D of a model that gives scores
    is_tied: bool
    attention_width: (
        int  # multiplications a query and key that it sees, of all layers: 2 heads Dh each
    )

    @property
    def parameters(self) -> Parameters:
        return functools.reduce(
            Parameters.plus, (k.parameters.times(k.layers) for k in self.kinds), self.outside
        )

    @property
    def layers(self) -> int:
        return sum(kind.layers for kind in self.kinds)

    @property
    def product_weights(self) -> int:
        """Weights of all layers that a token is multiplied with: of experts those that it meets."""
        return sum(kind.layers * kind.product_weights for kind in self.kinds)

    @property
    def largest_layer(self) -> Parameters:
        return max((kind.parameters for kind in self.kinds), key=lambda one: one.all)


def sizes_of(
    config: Any,
    *,
    bf16: bool,
    adapter: lora.AdapterConfig | None = None,
    tier: str = SHARED,
    build: small.Build | None = None,
    build_name: str = "",
) -> ModelSizes:
    """The sizes of the model that a transformers config describes, as a run has it.

    `bf16`: the run computes in it. `adapter`: what is trained in place of the model. `build` makes
    the model of a config, by default AutoModelForCausalLM; `build_name` tells its results apart
    from others'. Costs a fraction of a second, and nothing for what was asked in this process
    before.
    """
    content = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    key = (content, bf16, repr(adapter), tier, build_name)
    if key not in FOUND:
        FOUND[key] = _counted(config, build or _causal_lm, bf16, adapter, tier)
    return FOUND[key]


FOUND: dict[tuple[Any, ...], ModelSizes] = {}


def _causal_lm(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def _counted(
    config: Any, build: small.Build, bf16: bool, adapter: lora.AdapterConfig | None, tier: str
) -> ModelSizes:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        few = small.shallow(config, build)
        kinds = small.kinds_of_layers(build(copy.deepcopy(config)), config)
        kinds_of_few = small.kinds_of_layers(build(copy.deepcopy(few)), few)
        model = _made(copy.deepcopy(few), build, bf16, adapter, tier)
    batch = _batch()
    with FakeTensorMode(allow_non_fake_inputs=True), _unlogged():
        _empty_on_the_cpu(model)
        layers = _stack(model, len(kinds_of_few))
        packed = PackedModel(model, bf16=bf16)
        watch = Watch(TOKENS, model, layers)
        with watch.counting(), packed.autocast():
            _forward(packed, batch, tier)
    found = {}
    for place, kind in enumerate(kinds_of_few):
        found[kind] = LayerKind(
            layers=kinds.count(kind),
            parameters=_parameters(layers[place].named_parameters(), model, bf16),
            product_weights=watch.product_weights(place),
            kept=watch.kept(place),
        )
    inside = {p for layer in layers for p in layer.parameters()}
    outside = [(name, p) for name, p in model.named_parameters() if p not in inside]
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    depth = len(kinds)
    return ModelSizes(
        kinds=tuple(found.values()),
        outside=_parameters(outside, model, bf16),
        kept_outside=watch.outside(),
        hidden=embedding.shape[1],
        vocabulary=embedding.shape[0],
        head_weights=embedding.shape[1] if head is None else head.weight.numel(),
        is_tied=head is not None and head.weight is embedding,
        attention_width=watch.attention_width() * depth // max(len(kinds_of_few), 1),
    )


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Within, torch does not log an op that has no shapes (fp32 experts, say) with a traceback: the
    error is raised too, and told as the reason why nothing is planned."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled


def _batch() -> PackedBatch:
    """Three trees of two completions, T tokens in all."""
    trees = []
    for row, tokens in enumerate((200, 200, TOKENS - 400)):
        completion = np.ones(tokens // 4, dtype=np.int32)
        prompt = np.full(tokens - 2 * len(completion), row, dtype=np.int32)
        trees.append(Tree(row, prompt, (completion, completion)))
    return pack(trees)


def _made(
    config: Any,
    build: small.Build,
    bf16: bool,
    adapter: lora.AdapterConfig | None,
    tier: str,
) -> Any:
    """The model as a run has it once its optimizer is there."""
    config.dtype = torch.float32
    model = build(config).train()
    model.set_attn_implementation(
        attention.register() if tier == SHARED else attention.own_attention(model)
    )
    if adapter is not None:
        lora.add_adapter(model, adapter, "the model")
        if bf16:
            lora.store_frozen_in_bf16(model)
    elif bf16:
        for p in matrices(model):
            p.data = p.data.to(torch.bfloat16)
    return model


def _empty_on_the_cpu(model: Any) -> None:
    """Under FakeTensorMode: tensors of a model on the meta device become ones that a CPU seems to
    hold, so that autocast knows them. What is tied stays so."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                empty = made.get(id(p))
                if empty is None:
                    values = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                    empty = made[id(p)] = nn.Parameter(values, requires_grad=p.requires_grad)
                module._parameters[name] = empty
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _forward(packed: PackedModel, batch: PackedBatch, tier: str) -> None:
    if tier == SHARED:
        packed.hidden_states(batch)
    else:
        # One row without position ids: with them transformers reads where sequences begin.
        decoder = packed.model.base_model
        decoder(input_ids=batch.input_ids[None], use_cache=False)


def _stack(model: Any, depth: int) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def _parameters(named: Iterable[tuple[str, nn.Parameter]], model: Any, bf16: bool) -> Parameters:
    would_split = matrices(model) if not bf16 else set()
    counts = dict.fromkeys(Parameters._fields, 0)
    for name, p in named:
        is_half = p.dtype == torch.bfloat16 or p in would_split
        if p.requires_grad:
            counts["split" if is_half else "whole"] += p.numel()
            counts["low_rank"] += p.numel() * (".lora_" in name)
        else:
            counts["frozen_half" if is_half else "frozen_whole"] += p.numel()
    return Parameters(**counts)
