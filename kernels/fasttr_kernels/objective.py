"""The loss of a chunk's groups and its gradient by log-probs, on vectors of a few numbers.

Legend: n completions and C rows of a chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import checks, chunks
from fasttr_kernels.head import RowLogps

# (logp (n,), ref_logp (n,) or None, groups) -> (); with `loss_reads` also a dict of means (n,).
LossFn = Callable[..., Tensor]
# Statistics of rows that a loss may read, and where a sweep leaves them.
ROWS = {
    "token_logp": "logp",
    "entropy": "entropy",
    "logit_mean": "mean",
    "log_sum_squares": "log_sum_squares",
}


class Objective(NamedTuple):
    """A loss_fn with what it is called with."""

    loss_fn: LossFn
    ref_logp: Tensor | None  # (N,)
    normalizer: float
    reads: tuple[str, ...]

    def weigh(
        self, want: bool, chunk: chunks.Chunk, logp_n: Tensor, rows_C: RowLogps
    ) -> chunks.Weights:
        """loss_fn of a chunk's groups over the normalizer and, with `want`, its gradient."""
        ref_n = None if self.ref_logp is None else self.ref_logp[chunk.completions]
        arguments: list[Any] = [ref_n, chunk.groups]
        if self.reads:
            arguments.append(_means(self.reads, rows_C, chunk.cu))
        loss, weight_n = loss_and_gradient(self.loss_fn, logp_n, arguments, self.normalizer, want)
        return chunks.Weights(loss, completion=weight_n)


def loss_and_gradient(
    loss_fn: LossFn, logp: Tensor, arguments: list[Any], normalizer: float, want: bool
) -> tuple[Tensor, Tensor | None]:
    """loss_fn(logp, *arguments) over the normalizer, without graph, and with `want` its gradient by
    logp."""
    without_autocast = torch.autocast(logp.device.type, enabled=False)
    with torch.set_grad_enabled(want), _without_hooks(), without_autocast:
        leaf = logp.detach().clone().requires_grad_(want)
        loss = loss_fn(leaf, *arguments)
        _check(loss, leaf, want)
        gradient = None
        if want and loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
    loss = loss.detach() / normalizer
    if not want:
        return loss, None
    if gradient is None:
        return loss, torch.zeros_like(logp)
    return loss, gradient / normalizer


def _without_hooks() -> contextlib.AbstractContextManager[None]:
    """Hooks of a checkpoint around the op would otherwise pack, and so run, the loss's little graph
    once more. Where hooks are switched off there are none, and setting neutral ones would raise."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _means(reads: tuple[str, ...], rows_C: RowLogps, cu: list[int]) -> dict[str, Tensor]:
    return {name: chunks.segment_mean(getattr(rows_C, ROWS[name]), cu) for name in reads}


def _check(loss: Any, leaf: Tensor, want: bool) -> None:
    if not isinstance(loss, Tensor):
        got = type(loss).__name__
    elif loss.dim() != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} {tuple(loss.shape)}"
    elif want and _reaches_other_leaf(loss, leaf):
        raise checks.fail(
            "loss_fn",
            "a loss that depends on another tensor that requires grad",
            "a function of logp and ref_logp",
            "detach it: it would get no gradient",
        )
    else:
        return
    raise checks.fail(
        "loss_fn", got, "a floating-point scalar ()", "return the sum of the groups' losses"
    )


def _reaches_other_leaf(loss: Tensor, leaf: Tensor) -> bool:
    seen: set[Any] = set()
    front = [loss.grad_fn]
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            return True
        front.extend(n for n, _ in node.next_functions)
    return loss.grad_fn is None and loss.requires_grad and loss is not leaf
