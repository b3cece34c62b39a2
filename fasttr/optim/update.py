"""One update of the weights: the norm of the gradients, clipping and the optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from fasttr_kernels import SplitAdamW, clip_factor
from torch import Tensor, nn

from fasttr.optim import named


class Update(NamedTuple):
    """What an update did; on the device until it is read."""

    gradient_norm: Tensor  # () fp32, before clipping
    is_broken: Tensor  # () bool: loss or gradient were not finite, and nothing was changed


class Followers(NamedTuple):
    """Tensors that move by `alpha` toward the new weights in the optimizer's own sweep."""

    tensors: list[tuple[Tensor, Tensor | None]]  # and remainders, in the order of the parameters
    alpha: float


class MasterAdamW(SplitAdamW):
    """SplitAdamW of a run: the steps of bf16 weights are made on fp32 masters, and the norm, the
    clipping and a reference that follows take part in its sweep."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dtype == torch.bfloat16:
                p.grad_dtype = None  # it would be bf16; see `begin_step`

    def begin_step(self, packs: int) -> None:
        """Gradients of bf16 weights are bf16; those of several packs are added up in fp32, into
        buffers that autograd finds in their place."""
        for p in parameters_of(self):
            if p.dtype == torch.bfloat16:
                p.grad = torch.zeros_like(p, dtype=torch.float32) if packs > 1 else None

    def update(
        self,
        loss: Tensor,
        max_grad_norm: float,
        followers: Followers | None,
        squares: Tensor | None = None,
    ) -> Update:
        """See `update` below."""
        squares = self.grad_squares() if squares is None else squares
        norm = squares.sqrt()
        is_broken = ~torch.isfinite(norm) | ~torch.isfinite(loss)
        factor = clip_factor(squares, max_grad_norm if max_grad_norm > 0 else torch.inf)
        references, alpha = followers if followers is not None else (None, 0.0)
        clip = torch.where(is_broken, -1.0, factor)
        self.step(clip=clip, references=references, alpha=alpha)
        return Update(norm.to(torch.float32), is_broken)

    def take_up(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from the states of this class with the same moments, or of torch's AdamW."""
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                for key, mine in self.state[p].items():
                    if key == "step":
                        mine.copy_(_clock(saved[f"{name}.step"], group["betas"]))
                    elif key != "remainder":
                        mine.copy_(saved[f"{name}.{key}"])


def begin_step(optimizer: torch.optim.Optimizer, packs: int) -> None:
    """Before the packs of a step."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.begin_step(packs)


def update(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    loss: Tensor,
    max_grad_norm: float,
    followers: Followers | None = None,
    squares: Tensor | None = None,
) -> Update:
    """Clip the gradients of `model` to a norm, where it is above 0, and step; then they are gone.

    Where they or `loss` (), that of the step, are not finite nothing is changed, and nobody waits
    for the device. `followers` are for MasterAdamW alone. `squares`: the sum of squares of the
    whole gradient, () fp64, where the optimizer has a part of a divided model.
    """
    if isinstance(optimizer, MasterAdamW):
        done = optimizer.update(loss, max_grad_norm, followers, squares)
    else:
        assert followers is None, "these weights are followed after the step"
        norm = _clipped(optimizer, model, max_grad_norm, squares)
        done = Update(norm, ~torch.isfinite(norm) | ~torch.isfinite(loss))
        named.update(optimizer, done.is_broken)
    optimizer.zero_grad(set_to_none=True)
    return done


def _clipped(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    max_grad_norm: float,
    squares: Tensor | None,
) -> Tensor:
    """Clip the gradient's norm and return what it was; 0 clips nothing."""
    if squares is None:
        trained = [p for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    else:
        trained = [p for p in parameters_of(optimizer) if p.grad is not None]
        norm = squares.sqrt().to(torch.float32)
    if max_grad_norm > 0:
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    return norm


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a checkpoint keeps of an optimizer, under NAME.KEY; remainders belong to the weights."""
    found = named.state_tensors(optimizer)
    return {key: x for key, x in found.items() if not key.endswith(".remainder")}


def take_up_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` gave; AdamW's states fit with bf16 weights and with fp32."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.take_up(saved)
    else:
        named.take_up_state(optimizer, {key: _plain_step(key, x) for key, x in saved.items()})


def give_back(optimizer: torch.optim.Optimizer) -> None:
    """Make bf16 weights fp32 again: their masters."""
    if isinstance(optimizer, MasterAdamW):
        optimizer.to_fp32()
        for p in parameters_of(optimizer):
            p.grad_dtype = p.dtype


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def masters(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The fp32 weights of a model by name: bf16 ones with the remainders that the optimizer has."""
    whole = optimizer.master if isinstance(optimizer, MasterAdamW) else _as_it_is
    return {name: whole(p) for name, p in model.named_parameters()}


def _as_it_is(parameter: Tensor) -> Tensor:
    return parameter.data


def _clock(saved: Tensor, betas: tuple[float, float]) -> Tensor:
    """SplitAdamW's clock: steps, beta1^steps, beta2^steps; torch's AdamW counts steps alone."""
    if saved.numel() == 3:
        return saved
    steps = float(saved)
    return torch.tensor([steps, betas[0] ** steps, betas[1] ** steps], dtype=torch.float64)


def _plain_step(key: str, value: Tensor) -> Tensor:
    """The steps of SplitAdamW's clock, as torch's AdamW counts them."""
    is_clock = key.endswith(".step") and value.numel() == 3
    return value[0].to(torch.float32) if is_clock else value
