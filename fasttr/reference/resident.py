"""The reference of on-policy training: a model of its own beside the policy, since the rows that it
scores do not exist before they are drawn."""

from __future__ import annotations

import torch
from fasttr_kernels import multi_tensor_lerp_
from torch import Tensor

from fasttr.models.packed import PackedModel
from fasttr.reference.schedule import Fixed, Schedule, Soft


class ResidentReference:
    """A frozen model that may follow the policy.

    `model` is None where nothing reads a reference. `weights` are what a checkpoint must hold: none
    of a fixed one, which is read again from where it came.
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

    @torch.no_grad()
    def move(self, policy: PackedModel) -> None:
        """Towards the policy, or onto it."""
        assert self.weights is not None
        alpha = self.schedule.alpha if isinstance(self.schedule, Soft) else 1.0
        own = dict(policy.named_parameters())
        names = list(self.weights)
        multi_tensor_lerp_(
            [self.weights[name] for name in names], [own[name].data for name in names], alpha
        )
        self.updates += 1
