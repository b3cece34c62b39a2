"""The reference model: when it moves, which weights score a window, and the log-probs that remain.

A hard update needs no second model: right after it the reference is the policy, which therefore
scores the window itself. A fixed reference scores the run's rows once. Only a soft reference keeps
weights of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from fasttr_kernels import multi_tensor_lerp_
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.models.packed import PackedModel


@dataclass(frozen=True)
class Fixed:
    """The reference never moves (DPO, IPO)."""

    every: None = None

    def updates(self, steps: int) -> int:
        return 0

    def mean_age(self, steps: int) -> float:
        """Mean number of optimizer steps between the policy and the reference it is compared
        with."""
        return (steps - 1) / 2


@dataclass(frozen=True)
class Soft:
    """reference <- alpha policy + (1 - alpha) reference every `every` steps (arXiv:2404.09656, soft
    update)."""

    alpha: float = 0.6
    every: int = 512

    def updates(self, steps: int) -> int:
        return steps // self.every

    def mean_age(self, steps: int) -> float:
        """every (1 - alpha)/alpha + (every - 1)/2, its value in a long run."""
        if self.alpha == 0 or steps < self.every:
            return (steps - 1) / 2
        return self.every * (1 - self.alpha) / self.alpha + (self.every - 1) / 2


@dataclass(frozen=True)
class Hard:
    """reference <- policy every `every` steps (arXiv:2404.09656, hard update)."""

    every: int = 512

    def updates(self, steps: int) -> int:
        return steps // self.every

    def mean_age(self, steps: int) -> float:
        return (min(self.every, steps) - 1) / 2


Schedule = Fixed | Soft | Hard


class ScoreTable:
    """Summed log-probs per (row, completion), fp32 nats; NaN where not scored yet."""

    def __init__(self, rows: int, completions: int):
        self.values = np.full((rows, completions), np.nan, dtype=np.float32)

    def put(self, rows: Iterable[int], logp: Tensor) -> None:
        """`logp` (N,): the completions of `rows`, row after row."""
        self.values[list(rows)] = logp.cpu().numpy().reshape(-1, self.values.shape[1])

    def get(self, rows: Iterable[int]) -> Tensor:
        values = self.values[list(rows)]
        if np.isnan(values).any():
            raise RuntimeError("a row is used before the reference has scored it")
        return torch.from_numpy(values.reshape(-1))

    def missing(self, rows: Iterable[int]) -> bool:
        return bool(np.isnan(self.values[list(rows)]).any())

    def clear(self) -> None:
        self.values.fill(np.nan)

    def rows(self) -> np.ndarray:
        """Rows that are scored."""
        return np.flatnonzero(~np.isnan(self.values).any(axis=1))


def score_packs(
    model: PackedModel,
    packs: Iterable[PackedBatch],
    table: ScoreTable,
    after: Callable[[PackedBatch], None] | None = None,
) -> None:
    """Score packs into `table`, each by one forward; a pack whose rows are all there is passed
    over.

    `after` is called after every pack (progress, a partial save, a stop asked for by a signal).
    """
    pending: tuple[tuple[int, ...], Tensor] | None = None
    for batch in packs:
        if table.missing(batch.rows):
            logp = model.score(batch)
            if pending is not None:
                table.put(*pending)  # one pack late: reading the newest would leave the device idle
            pending = batch.rows, logp
        if after is not None:
            after(batch)
    if pending is not None:
        table.put(*pending)


class MovingReference:
    """The reference of a run under one schedule.

    Args:
        schedule: Fixed, Soft or Hard.
        policy: the model being trained.
        initial: another model that window 0 is scored with, or None for the policy as it is now.
    """

    def __init__(self, schedule: Schedule, policy: PackedModel, initial: PackedModel | None = None):
        self.schedule = schedule
        self.policy = policy
        self.updates = 0
        self._initial = initial
        self.model: PackedModel | None = None
        if isinstance(schedule, Soft):
            self.model = initial if initial is not None else copy.deepcopy(policy)
            self.model.requires_grad_(False)
        self._visits = (
            self.model is not None and (schedule.every or 1) > 1 and not _fits_beside(policy)
        )  # rests in CPU memory between windows

    def scorer(self) -> PackedModel:
        """The model whose weights are the reference now: valid only at a window's start."""
        if self.model is not None:
            return self.model.to(self.policy.device)
        if self.updates == 0 and self._initial is not None:
            return self._initial
        return self.policy

    def window_scored(self) -> None:
        """The window's log-probs are in the table: weights that only they needed are let go."""
        self._initial = None
        if self._visits and self.model is not None:
            self.model.to("cpu")

    @torch.no_grad()
    def move(self) -> None:
        """One update, by name; buffers are copied. Under `Hard` the policy itself is the new
        reference."""
        self.updates += 1
        if not isinstance(self.schedule, Soft) or self.model is None:
            return
        device = self.policy.device
        policy = dict(self.policy.named_parameters())
        names = [name for name, _ in self.model.named_parameters()]
        references = [parameter.data for _, parameter in self.model.named_parameters()]
        if self.model.device == device:
            multi_tensor_lerp_(
                references, [policy[name].data for name in names], self.schedule.alpha
            )
        else:
            for name, resting in zip(names, references, strict=True):
                visiting = resting.to(device)
                multi_tensor_lerp_([visiting], [policy[name].data], self.schedule.alpha)
                resting.copy_(visiting)
        buffers = dict(self.policy.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])


def _fits_beside(policy: PackedModel) -> bool:
    """Whether a second copy of the weights, and twice its size for AdamW's state, leaves half the
    device free."""
    if policy.device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    free, _ = torch.cuda.mem_get_info(policy.device)
    return 4 * size < free / 2
