"""The reference of on-policy training: a model of its own beside the policy, since the rows that it
scores do not exist before they are drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from fasttr_kernels import SplitAdamW, multi_tensor_lerp_
from torch import Tensor

from fasttr.models.packed import PackedModel
from fasttr.reference.schedule import Fixed, Schedule, Soft


class ResidentReference:
    """A frozen model that may follow the policy.

    `model` is None where nothing reads a reference. `weights` are those of one that moves; a fixed
    one is read again from where it came.
    """

    def __init__(self, schedule: Schedule, model: PackedModel | None):
        self.schedule = schedule
        self.model = None if model is None else model.requires_grad_(False)
        self.updates = 0
        self.weights: dict[str, Tensor] | None = None
        if self.model is not None and not isinstance(schedule, Fixed):
            self.weights = {name: p.data for name, p in self.model.named_parameters()}

    def moves_after(self, step: int) -> bool:
        """Whether it moves once `step` optimizer steps are done."""
        every = self.schedule.every
        return self.weights is not None and every is not None and step % every == 0

    def named_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of a reference that moves."""
        return dict(self.weights or {})

    @torch.no_grad()
    def take_up(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from `named_tensors`."""
        for name, mine in (self.weights or {}).items():
            mine.copy_(saved[name])

    @torch.no_grad()
    def move(self, policy: PackedModel, optimizer: torch.optim.Optimizer) -> None:
        """Towards the policy, or onto it; bf16 weights are read with their remainders, which the
        optimizer has."""
        assert self.weights is not None
        alpha = self.schedule.alpha if isinstance(self.schedule, Soft) else 1.0
        own = dict(policy.named_parameters())
        names = list(self.weights)
        whole = optimizer.master if isinstance(optimizer, SplitAdamW) else _as_it_is
        multi_tensor_lerp_(
            [self.weights[name] for name in names], [whole(own[name]) for name in names], alpha
        )
        self.updates += 1


def _as_it_is(parameter: Tensor) -> Tensor:
    return parameter.data
