"""The reference of a run: which weights it has, and how they move.

A hard update needs no second model: right after it the reference is the policy, which therefore
scores the window itself. A fixed reference is needed once, ahead of the run. Only a soft one keeps
weights of its own: plain tensors, which the policy's own module borrows while a window is scored.
They are those that are trained, since frozen ones are the policy's; of an adapter they are factors
of a higher rank (see `fasttr.reference.low_rank`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from fasttr_kernels import multi_tensor_lerp_
from torch import Tensor

from fasttr.errors import FasttrError
from fasttr.models.lora import factor_names
from fasttr.models.packed import PackedModel
from fasttr.reference.low_rank import Product, RankBound, average_, widened
from fasttr.reference.schedule import Schedule, Soft


class MovingReference:
    """The reference of a run under one schedule.

    Args:
        schedule: Fixed, Soft or Hard.
        policy: the model being trained.
        initial: another model that window 0 is scored with, or None for the policy as it is now.
            FasttrError when a soft reference could not become an average of it and the policy.
        fits_beside: whether a soft reference stays on the policy's device between windows; else it
            rests in the host's memory.
        bound: of the rank of a soft reference whose policy is an adapter.
    """

    def __init__(
        self,
        schedule: Schedule,
        policy: PackedModel,
        initial: PackedModel | None = None,
        fits_beside: Callable[[PackedModel], bool] | None = None,
        bound: RankBound | None = None,
    ):
        self.schedule = schedule
        self.policy = policy
        self.updates = 0
        self.weights: dict[str, Tensor] | None = None  # of a soft reference, by the policy's names
        # Largest share of a weight's update that the newest move left out; None: it left out none.
        self.dropped: float | None = None
        self._initial = initial
        self._bound = bound
        self._factors = factor_names(policy)
        if isinstance(schedule, Soft):
            self.weights = _weights_of(policy) if initial is None else _taken_from(initial, policy)
            self._initial = None
            self._widen()
            self._rests_beside = schedule.every == 1 or (fits_beside or _fits_beside)(policy)
            if not self._rests_beside:
                self.weights = {name: x.cpu() for name, x in self.weights.items()}

    @contextlib.contextmanager
    def model(self) -> Iterator[PackedModel]:
        """A model that is the reference while the block runs: only at a window's start."""
        if self.weights is not None:
            with self._lent(self.weights):
                yield self.policy
        elif self.updates == 0 and self._initial is not None:
            yield self._initial
        else:
            yield self.policy

    @property
    def is_the_policy(self) -> bool:
        """Whether the policy's own weights are the reference's: only at a window's start."""
        return self.weights is None and (self.updates > 0 or self._initial is None)

    def window_scored(self) -> None:
        """The window's log-probs are in the table: a first reference of its own is let go."""
        self._initial = None

    @torch.no_grad()
    def move(self) -> None:
        """One update, by name. Under `Hard` the policy itself is the new reference."""
        self.updates += 1
        if self.weights is None or not isinstance(self.schedule, Soft):
            return
        alpha = self.schedule.alpha
        policy = {name: p.data for name, p in self.policy.named_parameters()}
        products = {name for factors in self._factors for name in factors}
        plain = [name for name in self.weights if name not in products]
        if self._rests_beside:
            moved = [self.weights[name] for name in plain]
            multi_tensor_lerp_(moved, [policy[name] for name in plain], alpha)
        else:
            for name in plain:
                visiting = self.weights[name].to(policy[name].device, copy=True)
                multi_tensor_lerp_([visiting], [policy[name]], alpha)
                self.weights[name].copy_(visiting)
        self._move_products(self.weights, policy, alpha)

    def _move_products(
        self, weights: dict[str, Tensor], policy: dict[str, Tensor], alpha: float
    ) -> None:
        shares = []
        for a, b in self._factors:
            assert self._bound is not None
            reference = Product(weights[a], weights[b])
            moved_to = Product(policy[a].to(weights[a].device), policy[b].to(weights[b].device))
            shares.append(average_(reference, moved_to, alpha, self._bound.tolerance))
        self.dropped = max(shares, default=None)

    def _widen(self) -> None:
        """Room for a rank beyond the policy's in the factors of an adapter."""
        if not self._factors:
            return
        if self._bound is None:
            raise ValueError("MovingReference: got an adapter with a soft schedule and no bound")
        assert self.weights is not None
        for a, b in self._factors:
            product = Product(self.weights[a], self.weights[b])
            self.weights[a], self.weights[b] = widened(product, self._bound.rank)

    @contextlib.contextmanager
    def _lent(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within, the policy's module computes with these weights."""
        lent = {name: p for name, p in self.policy.named_parameters() if name in weights}
        own = {name: p.data for name, p in lent.items()}
        try:
            for name, parameter in lent.items():
                parameter.data = weights[name].to(parameter.device, non_blocking=True)
            yield
        finally:
            for name, parameter in lent.items():
                parameter.data = own[name]


def _weights_of(model: PackedModel) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone() for name, p in trained.items()}


def _taken_from(initial: PackedModel, policy: PackedModel) -> dict[str, Tensor]:
    """The weights of another model, which must have the policy's names, shapes and buffers."""
    weights = {name: p.detach() for name, p in initial.named_parameters()}
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    wanted = {name: tuple(p.shape) for name, p in policy.named_parameters()}
    names = sorted(shapes.keys() | wanted.keys())
    differing = [name for name in names if shapes.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise FasttrError(
            f"ref_model_name_or_path: got a model whose {name.removeprefix('model.')} has shape "
            f"{shapes.get(name, 'none')} with ref_update soft; wanted {wanted.get(name, 'none')} "
            "as in the policy, since the reference becomes an average of both"
        )
    buffers = dict(policy.named_buffers())
    for name, buffer in initial.named_buffers():
        if name not in buffers or not torch.equal(buffer, buffers[name]):
            raise FasttrError(
                f"ref_model_name_or_path: got a model whose {name.removeprefix('model.')} differs "
                "from the policy's with ref_update soft; wanted a model of one configuration, "
                "since the reference becomes an average of both"
            )
    return weights


def _fits_beside(policy: PackedModel) -> bool:
    """Whether a second copy of the weights, and twice its size for AdamW's state, leaves half the
    device free."""
    if policy.device.type != "cuda":
        return True
    size = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    free, _ = torch.cuda.mem_get_info(policy.device)
    return 4 * size < free / 2
