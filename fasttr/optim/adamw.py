"""AdamW and schedules from transformers, with TRL's parameter groups."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fasttr.errors import FasttrError
from fasttr.optim.matrices import matrices
from fasttr.optim.update import AdamW, FusedAdamW, MasterAdamW

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
    moments: str = "fp32"  # how they are held: fp32, bf16 or int8
    keeps_masters: bool = True  # bf16 weights have the other 16 bits of fp32 beside them
    seed: int = 0  # of stochastic rounding

    def optimizer(self, model: nn.Module, bf16: bool = False) -> AdamW:
        """Over all trainable parameters.

        Under bf16 compute the matrices become bf16 in place (see `MasterAdamW`); all other
        parameters stay fp32 leaves.
        """
        split = matrices(model) if bf16 else set()
        groups = parameter_groups(model, self.weight_decay, split)
        options: dict[str, Any] = {
            "lr": self.learning_rate,
            "betas": self.betas,
            "eps": self.eps,
        }
        if not bf16 and self.moments == "fp32":
            in_order = [p for p in model.parameters() if p.requires_grad]
            return FusedAdamW(groups, in_order, **options)
        options |= {"moments": self.moments, "seed": self.seed}
        if self.keeps_masters:
            return MasterAdamW.from_fp32(groups, **options)
        for p in split:
            p.grad = None
            p.data = p.data.to(torch.bfloat16)
        return MasterAdamW([{**group, "split": False} for group in groups], **options)

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


def parameter_groups(
    model: nn.Module, weight_decay: float, split: AbstractSet[nn.Parameter] = frozenset()
) -> list[dict[str, Any]]:
    """Every trainable parameter once, with its name: no decay on biases and on norms.

    Those of `split` have groups of their own. A group without parameters is left out, but for the
    first two.
    """
    kinds: dict[tuple[bool, bool], dict[str, nn.Parameter]] = {
        (decays, is_split): {} for is_split in (False, True) for decays in (True, False)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds[not _is_undecayed(name), parameter in split][name] = parameter
    groups: list[dict[str, Any]] = []
    for (decays, is_split), found in kinds.items():
        if found or not is_split:
            groups.append(
                {
                    "params": list(found.values()),
                    "names": list(found),
                    "weight_decay": weight_decay if decays else 0.0,
                    "split": is_split,
                }
            )
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = sum(p.numel() for group in groups for p in group["params"])
    if counted != wanted:
        raise RuntimeError(f"parameter groups hold {counted} of {wanted} trainable values")
    return groups


def _is_undecayed(name: str) -> bool:
    return any(part == "bias" or "norm" in part for part in name.lower().split("."))
