"""Decoder layers compiled one by one: layers of one kind share their graphs, whatever the lengths.

A graph is made for the training forward and one for scoring without gradients. Both are made and
compared on two random packs before the first row is read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fasttr.batch import PackedBatch, Tree
from fasttr.console import say
from fasttr.errors import FasttrError, first_line
from fasttr.models.packed import PackedModel
from fasttr.models.quantised import is_quantised
from fasttr.models.sharded import decoder_layers
from fasttr.packing.layout import pack
from fasttr.packing.tiers import SHARED

Backend = str | Callable[..., Any]

GRAPHS = 64  # of one function: kinds of layers, each with and without gradients and adapters


def compile_layers(
    packed: PackedModel,
    asked: bool | None,
    backend: Backend = "inductor",
    budget: float | None = None,
    tokens: int | None = None,
) -> bool:
    """Compile every decoder layer where `asked` is true, or None and the model is on a CUDA device;
    whether it was done.

    None goes on without, and says so, where a layer has no whole graph; true is refused there with
    a FasttrError. `budget`: torch's activation_memory_budget, the share of a layer's activations
    that is kept for the backward; None keeps what is fastest. `tokens`: of a pack of the run; the
    first packs are about as long, for which the compiler lays out its kernels. None: long ones on a
    GPU, short ones on a CPU.
    """
    if asked is False or (asked is None and packed.device.type != "cuda"):
        return False
    reason = _obstacle(packed)
    if reason is None:
        reason = _compiled(packed, budgeted(backend, budget), tokens)
    if reason is None:
        return True
    if asked:
        raise FasttrError(f"compile: got true, and {reason}; leave it out")
    say(f"compile: not done, {reason}")
    return False


def _obstacle(packed: PackedModel) -> str | None:
    if packed.tier != SHARED:
        return f"the model's own attention in tier {packed.tier} has a graph for every length"
    if any(is_quantised(p) for p in packed.parameters()):
        return "weights in 4 bits are unpacked by functions of another package"
    if packed.router is not None:
        return "the router's logits are read on their way through the layers"
    return None if layers_of(packed) else "no decoder layers were found in it"


def budgeted(backend: Backend, budget: float | None) -> Backend:
    """The back end, whose partitioner may keep only a share of the activations that it would.

    A function of its own for every budget: compiled code is found again by it.
    """
    if budget is None or budget >= 1:
        return backend

    def within_budget(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return _graph_compiler(backend)(graph, inputs)

    return within_budget


def _graph_compiler(backend: Backend) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(backend) if isinstance(backend, str) else backend


class _Announced:
    """A back end that says so when it is asked for a graph in the middle of a run."""

    def __init__(self, backend: Backend):
        self.in_a_run = False
        self._backend = backend

    def __call__(self, graph: Any, inputs: Any) -> Any:
        if self.in_a_run:
            say("compile: a layer is compiled once more: the first packs had no call of this form")
        return _graph_compiler(self._backend)(graph, inputs)


def layers_of(packed: PackedModel) -> list[nn.Module]:
    """The decoder layers, each of which is compiled, or made again in the backward, by itself."""
    return decoder_layers(packed.model)


def _compiled(packed: PackedModel, backend: Backend, tokens: int | None) -> str | None:
    """Compile, and why that failed."""
    layers = layers_of(packed)
    say(f"compile: compiling {len(layers)} layers, a minute or two where they are large")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    begin = time.perf_counter()
    announced = _Announced(backend)
    for layer in layers:
        _compile(layer, announced, is_divided=packed.shards is not None)
    try:
        scores_alike = all([_same_scores(packed, batch) for batch in _trial_packs(packed, tokens)])
    except torch._dynamo.exc.TorchDynamoException as error:
        for layer in layers:
            _undo(layer)
        return f"a layer has no whole graph: {first_line(error)}"
    if packed.shards is not None:
        packed.reshard()
        # Ranks must go the same way.
        (differs,) = packed.shards.ranks.largest([int(not scores_alike)])
        scores_alike = not differs
    packed.scores_as_it_trains = not scores_alike
    announced.in_a_run = True
    say(f"compile: done in {time.perf_counter() - begin:.0f} s")
    return None


def _compile(layer: Any, backend: Backend, is_divided: bool) -> None:
    """A layer of divided weights gathers them in hooks around its forward, which stay outside."""
    options: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
    if is_divided:
        layer.forward = torch.compile(layer.forward, **options)
    else:
        layer.compile(**options)
        weights = tuple(layer.parameters())
        layer._compiled_call_impl = _without_sums(layer._compiled_call_impl, weights)


def _without_sums(call: Callable[..., Any], weights: Sequence[nn.Parameter]) -> Callable[..., Any]:
    """A layer's call, which may be traced anew at any time: torch traces no weight whose gradient
    has another dtype, as the sums over the packs of a step have."""

    def called(*args: Any, **kwargs: Any) -> Any:
        sums = [(p, p.grad) for p in weights if p.grad is not None and p.grad.dtype != p.dtype]
        for p, _ in sums:
            p.grad = None
        try:
            return call(*args, **kwargs)
        finally:
            for p, gradient in sums:
                p.grad = gradient

    return called


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within, layers run as they are written: with a growing cache of keys, say, every call has a
    form of its own."""
    compiled = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _undo(layer: Any) -> None:
    layer._compiled_call_impl = None
    layer.__dict__.pop("forward", None)


def _same_scores(packed: PackedModel, batch: PackedBatch) -> bool:
    """Whether log-probs with and without gradients are equal bit for bit. Leaves no gradients."""
    trained = packed(batch, lambda logp, ref_logp, groups: logp.sum())
    if packed.shards is None:
        parameters = [p for p in packed.parameters() if p.requires_grad]
        torch.autograd.grad(trained.loss, parameters, allow_unused=True)
    else:
        trained.loss.backward()
        packed.zero_grad()
    return torch.equal(trained.logp, packed.logps(batch))


# Two packs of other lengths, numbers of trees and completions: prompt, completions.
TRIALS = (((7, 5, 9), (3, 1, 4)), ((11, 2, 6), (6, 8, 3), (5, 1, 2)))
TOKENS_OF_A_GPU = 8192
MOST_TIMES = 61  # odd: no length has a factor that a graph could count on


def _trial_packs(packed: PackedModel, tokens: int | None) -> list[PackedBatch]:
    generator = np.random.default_rng(0)
    config = packed.model.config.get_text_config()
    if tokens is None and packed.device.type == "cuda":
        tokens = TOKENS_OF_A_GPU
    times = _times(tokens, getattr(config, "max_position_embeddings", None))
    packs = []
    for shapes in TRIALS:
        trees = []
        for row, lengths in enumerate(shapes):
            prompt, *completions = (
                generator.integers(0, config.vocab_size, times * n, dtype=np.int32) for n in lengths
            )
            trees.append(Tree(row, prompt, tuple(completions)))
        packs.append(pack(trees).to(packed.device))
    return packs


def _times(tokens: int | None, positions: int | None) -> int:
    """By how much the trials are lengthened: to packs of `tokens`, and sequences of `positions`, at
    most."""
    if tokens is None:
        return 1
    longest_pack = max(sum(map(sum, shapes)) for shapes in TRIALS)
    longest_tree = max(sum(lengths) for shapes in TRIALS for lengths in shapes)
    times = min(MOST_TIMES, tokens // longest_pack, (positions or tokens) // longest_tree)
    return max(times - (times + 1) % 2, 1)
