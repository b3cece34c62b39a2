"""What the kernel tests share: the rule for errors, the two kinds of row functions, and a head to
try them on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fasttr_kernels import linear_preference_loss
from fasttr_kernels.preference import PreferenceLoss, linear_preference_loss_ref
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOOR_ULP = 4
KERNELS = Path(__file__).parents[2] / "kernels"


def bare(*command: str) -> subprocess.CompletedProcess:
    """Another process with this package on its path and nothing else of the project."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *command],
        env={**env, "PYTHONPATH": str(KERNELS)},
        cwd=KERNELS.anchor,
        capture_output=True,
        text=True,
    )


def assert_as_good_as_torch(
    name: str, got: Tensor, plain: Tensor, truth: Tensor, result_dtype: torch.dtype
) -> None:
    """err(got) <= 2 err(plain torch in the same dtype) + a few ulp of the largest entry, against
    fp64."""
    assert got.shape == truth.shape, (name, got.shape, truth.shape)
    assert got.isfinite().all(), name
    ours, theirs = (
        (x.double() - truth).abs().max().item() if x.numel() else 0.0 for x in (got, plain)
    )
    largest = truth.abs().max().item() if truth.numel() else 0.0
    floor = FLOOR_ULP * torch.finfo(result_dtype).eps * largest
    assert ours <= 2 * theirs + floor, (
        f"{name}: error {ours:.3e}, plain torch {theirs:.3e}, floor {floor:.3e}"
    )


def dpo(logp: Tensor, ref_logp: Tensor | None, groups: slice, beta: float = 0.1) -> Tensor:
    """DPO of pairs: the sum over groups of -log sigmoid(beta (log-ratio of chosen - log-ratio of
    rejected))."""
    ratio = logp if ref_logp is None else logp - ref_logp
    return -F.logsigmoid(beta * (ratio[0::2] - ratio[1::2])).sum()


def coupled(size: int) -> Callable[[Tensor, Tensor | None, slice], Tensor]:
    """A loss that couples all `size` completions of a group, not symmetric in them."""

    def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        scores = (logp if ref_logp is None else logp - ref_logp).view(
            groups.stop - groups.start, size
        )
        return (0.2 * scores).logsumexp(1).square().sum() + 0.1 * (
            scores[:, 0] * scores[:, -1]
        ).sum()

    return loss_fn


@dataclass
class Problem:
    """A head, rows and groups on `DEVICE`, from a seed."""

    lengths: list[int]
    group: int = 2
    hidden_size: int = 16
    vocab: int = 37
    dtype: torch.dtype = torch.float32
    bias: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    spread: float = 1.0

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)
        rows, shape = sum(self.lengths), (self.vocab, self.hidden_size)
        normal = lambda *size: torch.randn(*size, generator=make, dtype=torch.float64)  # noqa: E731
        place = lambda x: x.to(DEVICE, self.dtype).requires_grad_()  # noqa: E731
        self.hidden = place(self.spread * normal(rows, self.hidden_size) / self.hidden_size**0.5)
        self.weight = place(normal(*shape))
        self.bias_V = place(normal(self.vocab)) if self.bias else None
        self.target = torch.randint(self.vocab, (rows,), generator=make).to(DEVICE)
        self.cu_completions = torch.tensor([0, *self.lengths]).cumsum(0)
        self.cu_groups = torch.arange(0, len(self.lengths) + 1, self.group)
        self.groups = len(self.lengths) // self.group
        self.ref_logp = normal(len(self.lengths)).to(DEVICE)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias_V) if x is not None]

    def in_fp64(self) -> list[Tensor]:
        return [x.detach().double().requires_grad_() for x in self.leaves()]

    def arguments(self) -> tuple:
        return self.target, self.cu_completions, self.cu_groups, self.loss_fn

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor | None, slice], Tensor]:
        return dpo if self.group == 2 else coupled(self.group)

    def loss(
        self, leaves: list[Tensor] | None = None, op: Callable = linear_preference_loss, **kw: Any
    ) -> PreferenceLoss:
        hidden, weight, *bias = leaves or self.leaves()
        kw = {"ref_logp": self.ref_logp, "normalizer": max(1, self.groups), **self.options, **kw}
        return op(hidden, weight, *self.arguments(), bias=bias[0] if bias else None, **kw)

    def truth(self, **kw: Any) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
        """The specification in fp64 with its gradients."""
        leaves = self.in_fp64()
        out = self.loss(leaves, linear_preference_loss_ref, **kw)
        return out, torch.autograd.grad(out.loss, leaves)

    def plain(self, **kw: Any) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
        """Plain torch in the dtype of the problem, with its gradients."""
        out = self.loss(
            None, linear_preference_loss_ref, **{"ref_logp": self.ref_logp.to(self.dtype), **kw}
        )
        return out, torch.autograd.grad(out.loss, self.leaves())

    def ours(self, **kw: Any) -> tuple[PreferenceLoss, tuple[Tensor, ...]]:
        out = self.loss(**kw)
        return out, torch.autograd.grad(out.loss, self.leaves())


LENGTHS = [5, 1, 4, 3, 8, 6]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"options": {"logit_scale": 0.3}},
    "softcap": {"options": {"softcap": 2.0}, "spread": 3.0},
    "all of them": {"bias": True, "options": {"logit_scale": 1.7, "softcap": 3.0}},
    "odd sizes over a block": {"vocab": 5003, "hidden_size": 7, "bias": True},
    "peaked": {"spread": 40.0},
    "capped as Gemma's": {"options": {"softcap": 30.0}, "spread": 20.0},
}


def assert_equal_to_truth(problem: Problem, **kw) -> None:
    """fp64 against the specification: equal up to the order of summation."""
    (got, got_grads), (truth, truth_grads) = problem.ours(**kw), problem.truth()
    for a, b in zip(
        (got.loss, got.logp, got.token_logp, *got_grads), (*truth[:3], *truth_grads), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
