"""Optimizers by the names that transformers gives them, with its arguments and defaults."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr.errors import FasttrError

Groups = list[dict[str, Any]]


class Arguments(NamedTuple):
    """What optimizers are set by."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    own: Mapping[str, Any]  # those of `optim_args`


class Kind(NamedTuple):
    """How an optimizer is built, and what `optim_args` may say to it."""

    build: Callable[[Groups, Arguments], torch.optim.Optimizer]
    arguments: tuple[str, ...] = ()
    package: str | None = None  # that it needs beside torch and transformers
    notice: str = ""  # how it differs from what the name says
    is_adamw: bool = False  # in fp32: its weights may be split and its moments held otherwise
    is_elementwise: bool = True  # a weight's step does not depend on other rows of its matrix


def _adamw(groups: Groups, wanted: Arguments) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups, lr=wanted.learning_rate, betas=wanted.betas, eps=wanted.eps, fused=True
    )


def _adafactor(groups: Groups, wanted: Arguments) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=wanted.learning_rate, scale_parameter=False, relative_step=False)


def _sgd(groups: Groups, wanted: Arguments) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=wanted.learning_rate, **wanted.own)


def _adagrad(groups: Groups, wanted: Arguments) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, lr=wanted.learning_rate, **wanted.own)


def _rmsprop(groups: Groups, wanted: Arguments) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=wanted.learning_rate, **wanted.own)


def _low_bit(name: str) -> Callable[[Groups, Arguments], torch.optim.Optimizer]:
    def build(groups: Groups, wanted: Arguments) -> torch.optim.Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(
            groups, lr=wanted.learning_rate, betas=wanted.betas, eps=wanted.eps, **wanted.own
        )

    return build


_UNPAGED = "the values of AdamW; its states are not paged"
_BY_TORCHAO = "torchao's AdamW8bit in place of that of bitsandbytes: blocks of 256, other roundings"
_ADAMW = Kind(_adamw, is_adamw=True)
_ADAMW_8BIT = Kind(_low_bit("AdamW8bit"), ("block_size",), "torchao")
_ADAMW_4BIT = Kind(_low_bit("AdamW4bit"), ("block_size",), "torchao")

OPTIMIZERS: dict[str, Kind] = {
    "adamw_torch_fused": _ADAMW,
    "adamw_torch": _ADAMW,
    "adamw_hf": _ADAMW,
    "adamw_apex_fused": _ADAMW,
    "paged_adamw_32bit": _ADAMW._replace(notice=_UNPAGED),
    "paged_adamw": _ADAMW._replace(notice=_UNPAGED),
    "adamw_torch_8bit": _ADAMW_8BIT,
    "adamw_torch_4bit": _ADAMW_4BIT,
    "adamw_8bit": _ADAMW_8BIT._replace(notice=_BY_TORCHAO),
    "adamw_bnb_8bit": _ADAMW_8BIT._replace(notice=_BY_TORCHAO),
    "paged_adamw_8bit": _ADAMW_8BIT._replace(notice=f"{_BY_TORCHAO}; not paged"),
    "adafactor": Kind(_adafactor, is_elementwise=False),
    "sgd": Kind(_sgd, ("momentum", "dampening", "weight_decay", "nesterov")),
    "adagrad": Kind(_adagrad, ("lr_decay", "weight_decay", "initial_accumulator_value", "eps")),
    "rmsprop": Kind(_rmsprop, ("momentum", "alpha", "eps", "weight_decay", "centered")),
}


def check_optimizer(name: str, text: str | None) -> None:
    """Raise FasttrError for arguments that an optimizer does not know, or a package it lacks."""
    kind = OPTIMIZERS[name]
    parse_arguments(name, text)
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        raise FasttrError(
            f"optim: {name} needs the package {kind.package}; run pip install {kind.package}, or "
            "take adamw_torch"
        )


def parse_arguments(name: str, text: str | None) -> dict[str, Any]:
    """`optim_args` such as momentum=0.9,nesterov=true. FasttrError names what is not known."""
    known = OPTIMIZERS[name].arguments
    found: dict[str, Any] = {}
    for item in (text or "").replace(" ", "").split(","):
        if not item:
            continue
        key, equals, value = item.partition("=")
        if key not in known or not equals:
            wanted = ", ".join(known) or "nothing: it is set by adam_beta1, adam_epsilon and so on"
            raise FasttrError(f"optim_args: got {item!r} with optim {name}; wanted {wanted}")
        found[key] = _value(key, value)
    return found


def update(optimizer: torch.optim.Optimizer, is_broken: Tensor) -> None:
    """One step; none, and no change of any state, where the flag () on the device is up."""
    if optimizer.defaults.get("fused"):
        # The fused kernel reads the flag on the device: nobody waits.
        optimizer.found_inf = is_broken.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(is_broken):
        optimizer.step()


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as plain tensors under NAME.KEY, or NAME.KEY/PART of a quantised one."""
    found = {}
    for name, state in _states(optimizer).items():
        for key, value in state.items():
            if isinstance(value, Tensor) and type(value) is not Tensor:
                parts, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
                found.update({f"{name}.{key}/{part}": getattr(value, part) for part in parts})
            elif isinstance(value, Tensor):
                found[f"{name}.{key}"] = value
            elif value is not None:
                found[f"{name}.{key}"] = torch.tensor(value, dtype=torch.float64)
    return found


def take_up_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    templates = _templates(optimizer, tensors)
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        by_name.setdefault(name, {})[key] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            saved = by_name.get(name, {})
            optimizer.state[parameter] = _rebuilt(saved, parameter, templates.get(name, {}))


def _rebuilt(
    saved: Mapping[str, Tensor], parameter: Tensor, template: Mapping[str, Any]
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, value in saved.items():
        key, _, part = key.partition("/")
        if part:
            state.setdefault(key, template[key])
            getattr(state[key], part).copy_(value)
        elif value.dtype == torch.float64:  # a number of Adafactor's; states are fp32
            number = value.item()
            state[key] = int(number) if key == "step" else number
        else:
            state[key] = value.to(parameter.device)
    return state


def _templates(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Empty quantised states, by parameter: what an optimizer makes for itself at a step that
    changes nothing."""
    if not any("/" in name for name in tensors):
        return {}
    before = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    for parameter, _ in before:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, value in before:
        parameter.grad = None
        parameter.data.copy_(value)
    return _states(optimizer)


def _states(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def _value(key: str, value: str) -> Any:
    if key in ("nesterov", "centered"):
        return value.lower() in ("true", "1", "yes")
    try:
        return int(value) if key == "block_size" else float(value)
    except ValueError:
        raise FasttrError(f"optim_args: got {key}={value}; wanted a number") from None
