"""Rows of packed tensors, gathered so that the backward repeats bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttr.batch import RowGather


def gather_rows(x: Tensor, gather: RowGather) -> Tensor:
    """Rows `gather.sources` of x (T, ...) with a deterministic backward.

    x itself when the gather is the identity.
    """
    return x if gather.sources is None else _GatherRows.apply(x, gather.sources, gather)


class _GatherRows(torch.autograd.Function):
    """x[sources] along dimension 0. The backward of `index_select` would add atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, gather: RowGather) -> Tensor:
        ctx.gather, ctx.rows = gather, x.shape[0]
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_x = grad.new_zeros(ctx.rows, *grad.shape[1:])
        for level, (sources, outputs) in enumerate(ctx.gather.levels):
            of_readers = grad.index_select(0, outputs)
            if level > 0:
                of_readers += grad_x.index_select(0, sources)
            # Sources are unique within a level: one writer each.
            grad_x.index_copy_(0, sources, of_readers)
        return grad_x, None, None
