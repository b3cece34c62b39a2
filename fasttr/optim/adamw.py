"""AdamW from torch and schedules from transformers, with TRL's parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fasttr.errors import FasttrError

NO_SCHEDULE = ("reduce_lr_on_plateau", "greedy")  # they need a metric at every step


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter once, in two groups: no decay on biases and on norms."""
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            where = plain if _undecayed(name) else decayed
            where[name] = parameter
    groups: list[dict[str, Any]] = [
        {"params": list(decayed.values()), "names": list(decayed), "weight_decay": weight_decay},
        {"params": list(plain.values()), "names": list(plain), "weight_decay": 0.0},
    ]
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = sum(p.numel() for group in groups for p in group["params"])
    if counted != expected:
        raise RuntimeError(f"parameter groups hold {counted} of {expected} trainable values")
    return groups


def _undecayed(name: str) -> bool:
    return any(part == "bias" or "norm" in part for part in name.lower().split("."))


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
):
    """Fused AdamW over all trainable parameters; `found_inf` set on it makes a step a no-op without
    a host read."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def schedule(
    optimizer, name: str, *, warmup_steps: float, total_steps: int, kwargs: dict[str, Any] | None
):
    """transformers' schedule of that name; `warmup_steps` below 1 is a share of all steps, rounded
    up."""
    from transformers import get_scheduler

    warmup = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    try:
        return get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (ValueError, TypeError) as error:
        raise FasttrError(
            f"lr_scheduler_type: {name} with lr_scheduler_kwargs {kwargs}: {error}"
        ) from error
