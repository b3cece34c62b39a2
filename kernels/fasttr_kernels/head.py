"""A linear head, and the log-probs of rows under it: what both families of row functions share.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import products


class Head(NamedTuple):
    """z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap), in the compute dtype of the
    products."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float | None,
        compute: torch.dtype,
    ) -> Head:
        wide = products.wide(compute)
        return cls(
            weight=weight.detach().to(compute),
            bias=None if bias is None else bias.detach().to(wide).contiguous(),
            logit_scale=float(logit_scale),
            softcap=None if softcap is None else float(softcap),
        )


class Statistics(NamedTuple):
    """What a sweep over the logits makes beside log-probs."""

    usual: bool = False  # entropy, argmax hits, mean logits
    log_sum_squares: bool = False


class RowLogps(NamedTuple):
    """Per row, fp32 or fp64 (`correct` bool): p_v = exp(z_v - top) / total. What was not asked for
    is None."""

    logp: Tensor  # (C,)
    top: Tensor  # (C,)
    total: Tensor  # (C,)
    entropy: Tensor | None  # (C,)
    correct: Tensor | None  # (C,)
    mean: Tensor | None  # (C,)
    log_sum_squares: Tensor | None  # (C,) log sum_v p_v^2

    @classmethod
    def empty(
        cls, device: torch.device, rows: int, dtype: torch.dtype, statistics: Statistics
    ) -> RowLogps:
        new = functools.partial(torch.empty, rows, device=device)
        return cls(
            logp=new(dtype=dtype),
            top=new(dtype=dtype),
            total=new(dtype=dtype),
            entropy=new(dtype=dtype) if statistics.usual else None,
            correct=new(dtype=torch.bool) if statistics.usual else None,
            mean=new(dtype=dtype) if statistics.usual else None,
            log_sum_squares=new(dtype=dtype) if statistics.log_sum_squares else None,
        )

    def part(self, rows: slice) -> RowLogps:
        """Views of some rows."""
        some = lambda x: None if x is None else x[rows]  # noqa: E731
        return RowLogps(
            logp=self.logp[rows],
            top=self.top[rows],
            total=self.total[rows],
            entropy=some(self.entropy),
            correct=some(self.correct),
            mean=some(self.mean),
            log_sum_squares=some(self.log_sum_squares),
        )
