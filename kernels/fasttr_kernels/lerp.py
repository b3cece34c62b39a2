"""The reference update: ref <- ref + alpha (policy - ref) over many tensors, computed in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def multi_tensor_lerp_(
    references: Iterable[Tensor],
    policies: Iterable[Tensor],
    alpha: float,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    remainders: Iterable[Tensor] | None = None,
) -> None:
    """references <- references + alpha (policies - references), in place."""
    if rounding != "nearest" or remainders is not None:
        raise NotImplementedError("stochastic rounding and split storage come with the kernel")
    for reference, policy in zip(references, policies, strict=True):
        ref, pol = (getattr(x, "to_local", lambda x=x: x)().data for x in (reference, policy))
        if alpha == 1:
            ref.copy_(pol)
        elif alpha:
            ref.copy_(torch.lerp(ref.float(), pol.float(), alpha))
