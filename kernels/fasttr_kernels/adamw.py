"""AdamW whose bf16 weights have the other 16 bits of an fp32 master beside them.

Legend: n elements of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fasttr_kernels import adamw_torch, checks
from fasttr_kernels.adamw_torch import GROUP, MOMENTS, Hyper, Item, Moments
from fasttr_kernels.rounding import join_halves, split_halves

# A reference's tensor, and its remainder where it is split.
Reference = tuple[Tensor, Tensor | None]


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101, decoupled decay) in one sweep over weights, gradients and moments.

    A bf16 parameter and an int16 remainder are one fp32 number, bit for bit: the model reads a
    rounded weight, the step is made on the whole, at 4 bytes a weight. Without remainder a bf16
    weight is rounded stochastically, since the nearest one forgets most steps of a small rate. fp32
    parameters are plain. Gradients are bf16 or fp32; parameters without one keep still. Order of
    the operations, each rounded to fp32 (m, v before, g the clipped gradient, t the parameter's
    steps):

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + ((1 - beta2) g) g
        p <- (1 - lr weight_decay) p - (lr / (1 - beta1^t)) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        params: parameters or groups of them, bf16 or fp32, contiguous; local shards, not DTensors.
        lr, betas, eps, weight_decay: of every group that does not say otherwise.
        moments: `fp32`; `bf16`, rounded stochastically; or `int8`, companded in groups of 128.
            8, 4 or 2.06 bytes a weight.
        split: whether bf16 parameters have remainders, which start at 0.
        seed: of stochastic rounding, with the step and the place of a weight: equal seeds repeat.

    States are made at once. Replicas that must stay equal need an equal seed. `state_dict` resumes
    bit for bit; the high halves are the model's own weights.

    Raises:
        ValueError: dtypes, layouts, options, gradients or references that do not fit.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: str = "fp32",
        split: bool = True,
        seed: int = 0,
    ):
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "moments": moments, "split": split, "seed": seed})

    @classmethod
    def from_fp32(cls, params: Iterable[Tensor] | Iterable[dict[str, Any]], **options: Any) -> Self:
        """Round fp32 parameters to bf16 in place and keep what is rounded off, so that `master`
        gives the same bits. Groups with `split` False stay fp32. Gradients are dropped."""
        groups = _groups(params)
        remainders: dict[Tensor, Tensor] = {}
        for group in groups:
            if not group.get("split", options.get("split", True)):
                continue
            for p in group["params"]:
                if p.dtype != torch.float32:
                    raise checks.fail("params", p.dtype, "float32", "pass others to SplitAdamW()")
                p.grad = None
                p.data, remainders[p] = split_halves(p.detach().contiguous())
        optimizer = cls(groups, **options)
        for p, remainder in remainders.items():
            optimizer.state[p]["remainder"].copy_(remainder)
        return optimizer

    def to_fp32(self) -> None:
        """The inverse of `from_fp32`: parameters become their masters in place, and the optimizer
        forgets its states."""
        for p in self._parameters():
            p.grad = None
            p.data = self.master(p) if p.dtype == torch.bfloat16 else p.data
            self.state.pop(p, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_options(group)
        for p in group["params"]:
            _check_parameter(p, self._parameters()[0].device)
            self.state[p] = _state(p, group["moments"], group["split"])

    def master(self, p: Tensor) -> Tensor:
        """The fp32 numbers that steps are made on, a copy, of the shape of p."""
        remainder = self.state[p].get("remainder")
        if remainder is None:
            return p.detach().to(torch.float32, copy=True)
        return join_halves(p.detach(), remainder)

    @torch.no_grad()
    def grad_squares(self) -> Tensor:
        """The sum of squares of all gradients here, (), fp64, in one sweep and one order. On many
        ranks add them up before `clip_factor`."""
        parameters = self._parameters()
        grads = [p.grad.contiguous().view(-1) for p in parameters if p.grad is not None]
        if not parameters[0].is_cuda:
            return adamw_torch.squares(grads)
        from fasttr_kernels import adamw_triton

        return adamw_triton.squares(grads, parameters[0].device)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        clip: Tensor | float = 1.0,
        references: Sequence[Reference] | None = None,
        alpha: float = 0.0,
    ) -> Any:
        """One step of every parameter with a gradient.

        Args:
            closure: reevaluates the model, as torch's optimizers have it.
            clip: a factor on the gradients. Where it is negative or NaN nothing changes, steps and
                references included; a tensor on the device of the parameters is not waited for.
            references: (tensor, remainder or None) for each parameter in order, fp32 or bf16 with
                an int16 remainder: moved by `alpha` toward the new master in the same sweep, with
                the bits of `multi_tensor_lerp_`. All parameters then need gradients.
            alpha: share of the policy, in [0, 1].
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        items = self.items(references, alpha)
        if items and items[0].param.is_cuda:
            from fasttr_kernels import adamw_triton

            device = items[0].param.device
            # Nothing of a number on the host is waited for.
            factor = torch.full((), clip, device=device) if isinstance(clip, float | int) else clip
            adamw_triton.launch(items, factor.to(device), float(alpha), self.seed)
        else:
            adamw_torch.update(items, float(clip), float(alpha), self.seed)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state into this optimizer, of the same groups, shapes and moments.

        torch would cast a state to the dtype of its parameter.
        """
        mine = [self.state[p] for p in self._parameters()]
        for number, state in enumerate(mine):
            _check_state(number, state_dict["state"].get(number, {}), state)
        super().load_state_dict({**state_dict, "state": {}})
        for number, (p, state) in enumerate(zip(self._parameters(), mine, strict=True)):
            self.state[p] = state
            for name, tensor in state.items():
                tensor.copy_(state_dict["state"][number][name])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def seed(self) -> int:
        """Of stochastic rounding, of all groups."""
        return int(self.param_groups[0]["seed"])

    def items(
        self, references: Sequence[Reference] | None = None, alpha: float = 0.0
    ) -> list[Item]:
        """What a step is made of: flat views of each parameter with a gradient, and its state."""
        parameters = self._parameters()
        followed: Sequence[Reference | None] = [None] * len(parameters)
        if references is not None:
            _check_references(references, parameters, alpha)
            followed = references
        items = []
        number = 0
        for group in self.param_groups:
            hyper = _hyper(group)
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    _check_gradient(number, p)
                    items.append(_item(number, p, self.state[p], hyper, followed[number]))
                number += 1
        return items


def clip_factor(squares: Tensor, max_norm: float) -> Tensor:
    """The factor that brings gradients of that sum of squares to a norm of at most `max_norm`, ();
    -1, at which a step changes nothing, where the norm is not finite."""
    norm = squares.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(norm.isfinite(), factor, -1.0)


def _hyper(group: dict[str, Any]) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
    )


def _groups(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    given: list[Any] = list(params)
    if not given or isinstance(given[0], Tensor):
        return [{"params": given}]
    return [{**group, "params": list(group["params"])} for group in given]


def _state(p: Tensor, moments: str, split: bool) -> dict[str, Tensor]:
    flat = p.detach()
    first, second = MOMENTS[moments]
    state = {
        "step": torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=p.device),
        "exp_avg": torch.zeros_like(flat, dtype=first),
        "exp_avg_sq": torch.zeros_like(flat, dtype=second),
    }
    if moments == "int8":
        groups = -(-p.numel() // GROUP)
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            state[name] = torch.zeros(groups, dtype=torch.float32, device=p.device)
    if p.dtype == torch.bfloat16 and split:
        state["remainder"] = torch.zeros_like(flat, dtype=torch.int16)
    return state


def _item(
    number: int, p: Tensor, state: dict[str, Tensor], hyper: Hyper, reference: Reference | None
) -> Item:
    assert p.grad is not None
    flat = lambda x: None if x is None else x.view(-1)  # noqa: E731
    following, following_remainder = reference or (None, None)
    return Item(
        number=number,
        param=p.data.view(-1),
        remainder=flat(state.get("remainder")),
        grad=p.grad.detach().contiguous().view(-1),
        moments=Moments(
            first=state["exp_avg"].view(-1),
            second=state["exp_avg_sq"].view(-1),
            first_scale=state.get("exp_avg_scale"),
            second_scale=state.get("exp_avg_sq_scale"),
        ),
        clock=state["step"],
        hyper=hyper,
        reference=None if following is None else following.data.view(-1),
        reference_remainder=flat(following_remainder),
    )


def _check_options(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    ranges = {
        "lr": (group["lr"], group["lr"] >= 0, "at least 0"),
        "betas": (group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1, "two numbers in [0, 1)"),
        "eps": (group["eps"], group["eps"] >= 0, "at least 0"),
        "weight_decay": (group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
        "moments": (group["moments"], group["moments"] in MOMENTS, f"one of {list(MOMENTS)}"),
        "seed": (group["seed"], 0 <= group["seed"] < 2**63, "0..2**63 - 1"),
    }
    for name, (got, fits, wanted) in ranges.items():
        if not fits:
            raise checks.fail(name, got, wanted, "change it, or leave the default")


def _check_parameter(p: Tensor, device: torch.device) -> None:
    if checks.is_sharded(p):
        raise checks.fail(
            "params", "a DTensor", "plain tensors", "pass the local shards: p.to_local()"
        )
    if p.dtype not in (torch.bfloat16, torch.float32):
        raise checks.fail("params", p.dtype, "bfloat16 or float32", "convert the model")
    if p.device != device:
        raise checks.fail("params", p.device, f"one device, {device}", "use an optimizer for each")
    if not p.is_contiguous():
        raise checks.fail(
            "params", f"strides {p.stride()}", "contiguous parameters", "call .contiguous() first"
        )


def _check_gradient(number: int, p: Tensor) -> None:
    grad = p.grad
    assert grad is not None
    fits = grad.dtype in (torch.bfloat16, torch.float32) and grad.layout == torch.strided
    if not fits or grad.device != p.device:
        raise checks.fail(
            f"gradient of parameter {number}",
            f"{grad.dtype}, {grad.layout} on {grad.device}",
            f"dense bfloat16 or float32 on {p.device}",
            "convert it",
        )


def _check_references(references: Sequence[Reference], params: list[Tensor], alpha: float) -> None:
    if not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise checks.fail("alpha", alpha, "a number in [0, 1]", "it is the share of the policy")
    if len(references) != len(params):
        raise checks.fail(
            "references", len(references), f"{len(params)}, one for each parameter", "match them"
        )
    for number, ((reference, remainder), p) in enumerate(zip(references, params, strict=True)):
        name = f"references[{number}]"
        wanted = torch.float32 if remainder is None else torch.bfloat16
        if (reference.dtype, reference.shape, reference.device) != (wanted, p.shape, p.device):
            raise checks.fail(
                name,
                f"{reference.dtype} {tuple(reference.shape)} on {reference.device}",
                f"{wanted} {tuple(p.shape)} on {p.device}",
                "pass fp32, or bf16 with its int16 remainder",
            )
        if p.grad is None:
            raise checks.fail(
                name,
                "a parameter without gradient",
                "gradients for all",
                "move these references with multi_tensor_lerp_",
            )


def _check_state(number: int, saved: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
    form = lambda state: {n: (x.dtype, tuple(x.shape)) for n, x in state.items()}  # noqa: E731
    if form(saved) != form(mine):
        raise checks.fail(
            f"state of parameter {number}",
            form(saved),
            f"{form(mine)}",
            "build the optimizer with the moments and split of the run that saved it",
        )
