"""One update of the weights: the norm of the gradients, clipping and AdamW's step, without waiting
for the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fasttr_kernels import SplitAdamW, clip_factor
from torch import Tensor, nn


class Update(NamedTuple):
    """What an update did; on the device until it is read."""

    gradient_norm: Tensor  # () fp32, before clipping
    is_broken: Tensor  # () bool: loss or gradient were not finite, and nothing was changed


class Followers(NamedTuple):
    """Tensors that move by `alpha` toward the new weights in the optimizer's own sweep."""

    tensors: list[tuple[Tensor, Tensor | None]]  # and remainders, in the order of the parameters
    alpha: float


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, for fp32 weights: where computing is fp32 too, its bits are those of
    other trainers.

    Args:
        groups: with `names` beside `params`.
        in_order: all their parameters as the model has them, the order in which norms are added up.
    """

    def __init__(self, groups: list[dict[str, Any]], in_order: list[nn.Parameter], **options: Any):
        super().__init__(groups, **options, fused=True)
        self.in_order = in_order

    def begin_step(self, packs: int) -> None:
        """Before the packs of a step."""

    def update(
        self, loss: Tensor, max_grad_norm: float, followers: Followers | None = None
    ) -> Update:
        """Clip the gradients to a norm, where it is above 0, and step; `loss` () of that step."""
        assert followers is None, "these weights are followed after the step"
        trained = [p for p in self.in_order if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
        is_broken = ~torch.isfinite(norm) | ~torch.isfinite(loss)
        # With this flag up the fused kernel changes nothing: no weight, no moment.
        self.found_inf = is_broken.to(torch.float32)
        self.step()
        self.zero_grad(set_to_none=True)
        return Update(norm, is_broken)

    def named_state(self) -> dict[str, Tensor]:
        """NAME.exp_avg, NAME.exp_avg_sq, NAME.step of every parameter."""
        return _named_state(self)

    def take_up(self, saved: dict[str, Tensor]) -> None:
        """Go on from a `named_state`, of this class or of MasterAdamW with fp32 moments."""
        for name, p in named_parameters_of(self):
            mine = {key: saved[f"{name}.{key}"].to(p.device) for key in ("exp_avg", "exp_avg_sq")}
            steps = saved[f"{name}.step"].flatten()[0].to(p.device, torch.float32)
            self.state[p] = {**mine, "step": steps}

    def give_back(self) -> None:
        """The weights are fp32 as they are."""


class MasterAdamW(SplitAdamW):
    """SplitAdamW of a run: bf16 weights whose steps are made on fp32 masters."""

    def begin_step(self, packs: int) -> None:
        """Gradients of bf16 weights are bf16; those of several packs are added up in fp32, into
        buffers that autograd finds in their place."""
        for p in parameters_of(self):
            if p.dtype == torch.bfloat16:
                p.grad_dtype = None  # a leaf's own dtype otherwise
                p.grad = torch.zeros_like(p, dtype=torch.float32) if packs > 1 else None

    def update(
        self, loss: Tensor, max_grad_norm: float, followers: Followers | None = None
    ) -> Update:
        """Clip the gradients to a norm, where it is above 0, and step; `loss` () of that step."""
        squares = self.grad_squares()
        norm = squares.sqrt()
        is_broken = ~torch.isfinite(norm) | ~torch.isfinite(loss)
        factor = clip_factor(squares, max_grad_norm if max_grad_norm > 0 else torch.inf)
        references, alpha = followers if followers is not None else (None, 0.0)
        clip = torch.where(is_broken, -1.0, factor)
        self.step(clip=clip, references=references, alpha=alpha)
        self.zero_grad(set_to_none=True)
        return Update(norm.to(torch.float32), is_broken)

    def named_state(self) -> dict[str, Tensor]:
        """The moments, and the clock as NAME.step; remainders belong to the weights."""
        return {key: x for key, x in _named_state(self).items() if not key.endswith(".remainder")}

    def take_up(self, saved: dict[str, Tensor]) -> None:
        """Go on from a `named_state`, of this class with the same moments or of FusedAdamW."""
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                for key, mine in self.state[p].items():
                    if key == "step":
                        mine.copy_(_clock(saved[f"{name}.step"], group["betas"]))
                    elif key != "remainder":
                        mine.copy_(saved[f"{name}.{key}"])

    def give_back(self) -> None:
        """Make the weights fp32 again: their masters."""
        self.to_fp32()


AdamW = FusedAdamW | MasterAdamW


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def named_parameters_of(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Of groups that carry names."""
    names = [name for group in optimizer.param_groups for name in group["names"]]
    return list(zip(names, parameters_of(optimizer), strict=True))


def _named_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, p in named_parameters_of(optimizer):
        for key, value in optimizer.state[p].items():
            found[f"{name}.{key}"] = value
    return found


def _clock(saved: Tensor, betas: tuple[float, float]) -> Tensor:
    """SplitAdamW's clock: steps, beta1^steps, beta2^steps; torch's AdamW counts steps alone."""
    if saved.numel() == 3:
        return saved
    steps = float(saved)
    return torch.tensor([steps, betas[0] ** steps, betas[1] ** steps], dtype=torch.float64)
