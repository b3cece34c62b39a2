"""Rows of packed tensors, gathered so that the backward repeats bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from fasttr_kernels.gather import sum_over_readers
from torch import Tensor

from fasttr.batch import RowGather


def gather_rows(x: Tensor, gather: RowGather) -> Tensor:
    """Rows `gather.sources` of x (T, ...) with a deterministic backward."""
    return _GatherRows.apply(x, *gather)


class _GatherRows(torch.autograd.Function):
    """x[sources] along dimension 0. The backward of `index_select` would add atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sources: Tensor, offsets: Tensor, readers: Tensor) -> Tensor:
        ctx.save_for_backward(offsets, readers)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        flat = grad.contiguous().flatten(1)[:, None]
        nothing = flat[:, :, :0]
        total, _ = sum_over_readers(flat, nothing, *ctx.saved_tensors)
        return total.view(len(total), *grad.shape[1:]), None, None, None
