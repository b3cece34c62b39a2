"""An optimizer by its name and schedules from transformers, with TRL's parameter groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fasttr.errors import FasttrError
from fasttr.optim.named import OPTIMIZERS, Arguments, parse_arguments

PLATEAU = "reduce_lr_on_plateau"
# Schedules of transformers that are known before training, and the one that follows evaluations.
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
    PLATEAU,
)


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and the schedule of its rate."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.0  # decoupled; none on biases and norms
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    name: str = "adamw_torch_fused"
    arguments: str | None = None  # what an optimizer other than AdamW reads, as optim_args
    schedule: str = "linear"
    schedule_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0  # below 1 a share of all steps, rounded up

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Over all trainable parameters; step it by `fasttr.optim.named.update`."""
        own = parse_arguments(self.name, self.arguments)
        groups = parameter_groups(model, self.weight_decay)
        wanted = Arguments(self.learning_rate, self.betas, self.eps, own)
        return OPTIMIZERS[self.name].build(groups, wanted)

    def check_schedule(self) -> None:
        """Raise FasttrError where the schedule cannot be made, before there is a model."""
        parameter = nn.Parameter(torch.zeros(()))
        self.scheduler(torch.optim.SGD([parameter], lr=self.learning_rate), total_steps=100)

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


def after_step(scheduler: Any) -> None:
    """A schedule moves on with every step, unless it follows evaluations."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def after_evaluation(scheduler: Any, value: float) -> None:
    """Tell a schedule that follows evaluations what one has found."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(value)


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """What a schedule that follows evaluations has seen, as JSON values; None for any other one."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        return None
    names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
    state: dict[str, Any] = {name: getattr(scheduler, name) for name in names}
    state["best"] = None if math.isinf(state["best"]) else float(state["best"])
    return state | {"rates": scheduler.get_last_lr()}


def take_up_schedule(
    scheduler: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    state: dict[str, Any] | None,
) -> None:
    """Put a schedule where it was after `step` steps."""
    scheduler.last_epoch = step
    if state is None:
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * factor(step) for base, factor in rates]
    else:
        scheduler._last_lr = state["rates"]
        scheduler.num_bad_epochs = state["num_bad_epochs"]
        scheduler.cooldown_counter = state["cooldown_counter"]
        scheduler.last_epoch = state["last_epoch"]
        if state["best"] is not None:
            scheduler.best = state["best"]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


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
