"""Rows of keys and values gathered for packed sequences that share a prefix, and the sum of their
gradients in a fixed order.

A prompt that several completions share lies once in the pack; every completion's attention reads
it. The forward copies rows; the backward adds the gradients of a row's readers in the order of the
readers, in fp32 (fp64 for fp64), without atomics: equal inputs give equal bits.

The inverse of a gather comes as two vectors: row t is read by the gathered rows
readers[offsets[t] : offsets[t + 1]].

Legend: T rows of the pack, S gathered rows, H heads, Dk and Dv head widths of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_keys(
    k: Tensor,  # (T, H, Dk)
    v: Tensor,  # (T, H, Dv)
    sources: Tensor,  # (S,) int32
) -> tuple[Tensor, Tensor]:
    """Rows `sources` of keys and of values, contiguous; one launch on a GPU."""
    if k.is_cuda:
        from fasttr_kernels import gather_triton

        return gather_triton.gather(k, v, sources)
    return k.index_select(0, sources), v.index_select(0, sources)


def sum_over_readers(
    dk: Tensor,  # (S, H, Dk)
    dv: Tensor,  # (S, H, Dv)
    offsets: Tensor,  # (T + 1,) int32
    readers: Tensor,  # (S,) int32
) -> tuple[Tensor, Tensor]:
    """Gradients of keys (T, H, Dk) and values (T, H, Dv) from those of the gathered rows.

    A row that nobody reads gets 0.
    """
    if dk.is_cuda:
        from fasttr_kernels import gather_triton

        return gather_triton.sum_over_readers(dk, dv, offsets, readers)
    return _summed(dk, offsets, readers), _summed(dv, offsets, readers)


def _summed(grad: Tensor, offsets: Tensor, readers: Tensor) -> Tensor:
    counts = offsets.diff()
    total = grad.new_zeros(len(counts), *grad.shape[1:])
    read = torch.nonzero(counts > 0)[:, 0]
    total.index_copy_(0, read, grad.index_select(0, readers[offsets[read]]))
    several = torch.nonzero(counts > 1)[:, 0]
    if len(several):
        begin, counts = offsets[several], counts[several]
        total.index_copy_(0, several, _summed_wide(grad, begin, counts, readers))
    return total


def _summed_wide(grad: Tensor, begin: Tensor, counts: Tensor, readers: Tensor) -> Tensor:
    """Of rows with several readers each, in the dtype of `grad`."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = grad.index_select(0, readers[begin]).to(wide)
    for nth in range(1, int(counts.max())):
        still = torch.nonzero(counts > nth)[:, 0]
        of_nth = grad.index_select(0, readers[begin[still] + nth])
        total.index_add_(0, still, of_nth.to(wide))  # no row twice
    return total.to(grad.dtype)
