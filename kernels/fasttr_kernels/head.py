"""A linear head, and the log-probs of rows under it: what both families of row functions share.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

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


class RowLogps(NamedTuple):
    """Per row of a chunk, fp32 or fp64: p_v = exp(z_v - top) / total."""

    logp: Tensor  # (C,)
    top: Tensor  # (C,)
    total: Tensor  # (C,)
    entropy: Tensor | None  # (C,)
    correct: Tensor | None  # (C,)
    mean: Tensor | None  # (C,)
