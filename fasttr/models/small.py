"""A small random model of the structure that a transformers config describes.

Everything that decides what a token sees is kept: a layer of each kind, the ratio of heads,
experts. Widths and depth shrink, and windows where they are asked to: below the length of the rows
that they are tried on.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

VOCABULARY = 64
WINDOW = 4
LARGEST = 60_000_000  # parameters of a model that is still tried

_IS_WINDOW = re.compile(r"(window|window_size|attention_chunk_size)$")
_HEAD_WIDTHS = ("head_dim", "qk_head_dim", "v_head_dim")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_INNER_WIDTHS = (
    "block_ff_dim",
    "ffn_dim",
    "ffn_hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "mlp_hidden_size",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "n_inner",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)


Build = Callable[[Any], Any]  # a causal LM of a config, with random weights


def small_models(config: Any, shrink_windows: bool, build: Build) -> Iterator[Callable[[], Any]]:
    """Makers of copies with fp64 weights, the smallest first; those after it are for structures
    whose numbers do not shrink together. A maker fails in as many ways as transformers does."""
    for narrowed in _narrowed(config, shrink_windows):
        yield functools.partial(_random_model, narrowed, build)


def _narrowed(config: Any, shrink_windows: bool) -> Iterator[Any]:
    for narrows_heads, narrows_inner in ((True, True), (False, True), (False, False)):
        small = copy.deepcopy(config)
        for scope in _scopes(small):
            _shrink_vocabulary(scope)
            _silence(scope)
            if shrink_windows:
                _shrink_windows(scope)
            if narrows_heads:
                _narrow_heads(scope)
            if narrows_inner:
                _narrow_inner(scope)
        yield small


def smallest_window(config: Any) -> int | None:
    """Tokens of the narrowest window that a config names; None where it names none."""
    windows = [getattr(scope, key) for scope in _scopes(config) for key in _window_keys(scope)]
    return min(windows, default=None)


def _random_model(config: Any, build: Build) -> Any:
    """A causal LM whose outputs neither vanish nor grow with depth.

    Raises ValueError where the config describes more than `LARGEST` parameters.
    """
    with torch.device("meta"):
        config = shallow(config, build)
        size = sum(p.numel() for p in build(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest copy still has {size / 1e6:.0f} million parameters")
    model = build(copy.deepcopy(config)).double().train()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    _draw(model)
    return model


def shallow(config: Any, build: Build) -> Any:
    """The config of as few layers, at least two, as hold one of each kind."""
    kinds = kinds_of_layers(build(copy.deepcopy(config)), config)
    depth = max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    if depth >= len(kinds):
        return config
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = depth
    for key, values in _values_of_layers(config).items():
        setattr(cut, key, values[:depth])
    if set(kinds_of_layers(build(copy.deepcopy(cut)), cut)) != set(kinds):
        return config
    return cut


def kinds_of_layers(model: nn.Module, config: Any) -> list[object]:
    """What tells a layer from others: its modules, their settings, and the config's lists."""
    depth = _count(config, "num_hidden_layers")
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        return []
    lists = _values_of_layers(config).values()
    told = zip(*lists, strict=True) if lists else [()] * len(stacks[0])
    return [
        (repr(values), tuple(_settings(module) for module in layer.named_modules()))
        for layer, values in zip(stacks[0], told, strict=True)
    ]


def _values_of_layers(config: Any) -> dict[str, list[Any]]:
    depth = _count(config, "num_hidden_layers")
    values = {key: getattr(config, key, None) for key in vars(config)}
    lists = {key: v for key, v in values.items() if isinstance(v, list) and len(v) == depth}
    return {key: v for key, v in lists.items() if not _are_indices(v)}


def _are_indices(values: list[Any]) -> bool:
    """A list that names layers, and says nothing of each."""
    are_counts = all(type(v) is int for v in values)
    return are_counts and all(a < b for a, b in itertools.pairwise(values))


def _settings(named: tuple[str, nn.Module]) -> tuple[str, ...]:
    name, module = named
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | None) and not key.endswith("idx")
    }
    return (name, type(module).__name__, repr(sorted(plain.items())))


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Matrices that keep the size of what they multiply; noise on everything else."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.ndim >= 2:
            p.copy_(noise / p.shape[-1] ** 0.5)
        else:
            p.add_(0.1 * noise)


def _scopes(config: Any) -> Iterator[Any]:
    """A config and those inside it."""
    from transformers import PreTrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _scopes(value)


def _count(scope: Any, key: str) -> int | None:
    value = getattr(scope, key, None)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_count else None


def _shrink_vocabulary(scope: Any) -> None:
    for key in ("vocab_size", "vocab_size_per_layer_input"):
        if _count(scope, key):
            setattr(scope, key, VOCABULARY)
    for key, value in list(vars(scope).items()):
        if key.endswith("token_id") and isinstance(value, int | list):
            setattr(scope, key, 1)


def _silence(scope: Any) -> None:
    """Full precision, and nothing random."""
    if hasattr(scope, "quantization_config"):
        del scope.quantization_config
    for key, value in list(vars(scope).items()):
        is_rate = "dropout" in key or "pdrop" in key or "jitter" in key
        if is_rate and isinstance(value, float):
            setattr(scope, key, 0.0)


def _window_keys(scope: Any) -> list[str]:
    return [key for key in vars(scope) if _IS_WINDOW.search(key) and _count(scope, key)]


def _shrink_windows(scope: Any) -> None:
    for key in _window_keys(scope):
        setattr(scope, key, min(getattr(scope, key), WINDOW))


def _narrow_heads(scope: Any) -> None:
    """At most four heads on two key heads, or two on two, as wide as they were or 64."""
    heads, hidden = _count(scope, "num_attention_heads"), _count(scope, "hidden_size")
    if heads and hidden:
        key_heads = _count(scope, "num_key_value_heads")
        fewer_keys = min(key_heads or heads, 2)
        fewer = fewer_keys if key_heads in (None, heads) else 2 * fewer_keys
        if fewer < heads:
            is_explicit = any(_count(scope, key) for key in _HEAD_WIDTHS)
            scope.num_attention_heads = fewer
            scope.hidden_size = 64 * fewer if is_explicit else hidden * fewer // heads
            if key_heads:
                scope.num_key_value_heads = fewer_keys
    state_heads = _count(scope, "num_heads")
    if state_heads and hidden and _count(scope, "expand") and state_heads > 2:
        scope.num_heads = 2
        scope.hidden_size = hidden * 2 // state_heads
        scope.n_groups = 1


def _narrow_inner(scope: Any) -> None:
    for key in _INNER_WIDTHS:
        width = getattr(scope, key, None)
        if isinstance(width, list):
            setattr(scope, key, [min(w, 128) for w in width])
        elif (_count(scope, key) or 0) > 256:
            setattr(scope, key, 128)
    groups, chosen = _count(scope, "n_group") or 1, _count(scope, "num_experts_per_tok") or 1
    fewest = max(8, 2 * groups, chosen)
    for key in _EXPERTS:
        if (_count(scope, key) or 0) > fewest:
            setattr(scope, key, fewest)
