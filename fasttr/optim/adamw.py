"""AdamW from torch and schedules from transformers, with TRL's parameter groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasttr.errors import FasttrError

# Schedules of transformers that are known before training; the others need a metric at every step.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the schedule of its rate."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.0  # decoupled; none on biases and norms
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "linear"
    schedule_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0  # below 1 a share of all steps, rounded up

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Over all trainable parameters; `found_inf` set on it makes a step a no-op without a host
        read."""
        groups = parameter_groups(model, self.weight_decay)
        return torch.optim.AdamW(
            groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True
        )

    def scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        """transformers' schedule of that name."""
        from transformers import get_scheduler

        warmup = self.warmup_steps
        try:
            return get_scheduler(
                self.schedule,
                optimizer,
                num_warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
                num_training_steps=total_steps,
                scheduler_specific_kwargs=self.schedule_kwargs,
            )
        except (ValueError, TypeError) as error:
            raise FasttrError(
                f"lr_scheduler_type: {self.schedule} with lr_scheduler_kwargs "
                f"{self.schedule_kwargs}: {error}"
            ) from error


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter once, in two groups: no decay on biases and on norms."""
    decayed: dict[str, nn.Parameter] = {}
    plain: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = plain if _is_undecayed(name) else decayed
            group[name] = parameter
    groups: list[dict[str, Any]] = [
        {
            "params": list(decayed.values()),
            "names": list(decayed),
            "weight_decay": weight_decay,
        },
        {"params": list(plain.values()), "names": list(plain), "weight_decay": 0.0},
    ]
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = sum(p.numel() for group in groups for p in group["params"])
    if counted != wanted:
        raise RuntimeError(f"parameter groups hold {counted} of {wanted} trainable values")
    return groups


def _is_undecayed(name: str) -> bool:
    return any(part == "bias" or "norm" in part for part in name.lower().split("."))
