"""Metrics of on-policy training, under TRL's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.metrics.sums import MicroBatches

OF_STEPS = (
    "loss",
    "kl",
    "entropy",
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "value_loss",
    "value_clip_ratio",
)
OF_ROLLOUTS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
    "value",
    "explained_variance",
    "kl_coef",
)


class OnlineLedger:
    """A vector of a step's means, NaN where there is none; nothing is left to be summed."""

    def __init__(self, sources: Sequence[str]):
        of_sources = [f"rewards/{name}/{what}" for name in sources for what in ("mean", "std")]
        self.names: tuple[str, ...] = (*OF_STEPS, *OF_ROLLOUTS, *of_sources)

    def zeros(self, device: torch.device, micro_batches: int = 1) -> Tensor:
        return torch.zeros(micro_batches, len(self.names), device=device)

    def vector(self, values: Mapping[str, float]) -> Tensor:
        """(1, len(names)) means by name, on the host."""
        return torch.tensor([[values.get(name, float("nan")) for name in self.names]])

    def of_pack(
        self,
        out: Any,
        ref_logp: Tensor | None,
        batch: PackedBatch,
        micro_batches: MicroBatches | None = None,
        router_loss: Tensor | None = None,
    ) -> Tensor:
        raise TypeError("the means of a step on rollouts are made by the step itself")

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor:
        return total + of_pack

    def means(self, total: Tensor) -> Tensor:
        return total

    def metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        return {name: value for name, value in means.items() if not math.isnan(value)}
