"""PPO's critic: the loss of its values, and a coefficient of the KL that follows a target.

Legend: t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValueLoss:
    """0.5 max((v - G)^2, (clip(v, v_old - c, v_old + c) - G)^2) a token, G the return and v_old the
    value when the completion was drawn."""

    clip: float = 0.2

    def __call__(self, value: Tensor, old_value: Tensor, target: Tensor) -> Tensor:
        """(t,)"""
        error = (value - target) ** 2
        return 0.5 * torch.maximum(error, self._clipped_error(value, old_value, target))

    @torch.no_grad()
    def is_clipped(self, value: Tensor, old_value: Tensor, target: Tensor) -> Tensor:
        """(t,) bool: where the clip decides, so that the value gets no gradient or a stale one."""
        return self._clipped_error(value, old_value, target) > (value - target) ** 2

    def _clipped_error(self, value: Tensor, old_value: Tensor, target: Tensor) -> Tensor:
        near = torch.clamp(value, old_value - self.clip, old_value + self.clip)
        return (near - target) ** 2


@dataclass
class KlCoefficient:
    """The factor of the KL in a reward: fixed, or led towards a KL by a rule of proportion
    (arXiv:1909.08593, section 2.2)."""

    value: float
    target: float | None = None  # nats a completion; None: it stays as it is
    horizon: float = 10_000.0  # completions after which an error of one has been made up for

    def follow(self, kl: float, completions: int) -> None:
        """After so many completions with a mean KL of `kl` nats each."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * completions / self.horizon
