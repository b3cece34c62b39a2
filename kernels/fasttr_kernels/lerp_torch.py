"""The reference update in torch: CPU tensors, and any layout that the kernel does not take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Elements of a block of the torch path: its fp32 temporaries stay in cache.
BLOCK = 1 << 17


class Item(NamedTuple):
    """One flat pair on one device; `remainder` is the low half of a split reference."""

    reference: Tensor  # (n,)
    policy: Tensor  # (n,)
    remainder: Tensor | None  # (n,) int16


def _mix(
    reference: Tensor,
    policy: Tensor,
    alpha: float,
    step: Tensor | None = None,
    out: Tensor | None = None,
):
    """The lerp in the dtype of its arguments, from the nearer end: exact at alpha 0 and 1. `step`
    is scratch memory.

    Multiplied, then added: `torch.lerp` fuses the two in its vector loop alone, so its bits depend
    on where blocks end.
    """
    if alpha == 1:
        return policy
    step = torch.sub(policy, reference, out=step)
    if alpha < 0.5:
        return torch.add(step.mul_(alpha), reference, out=out)
    return torch.sub(policy, step.mul_(1 - alpha), out=out)


def join_halves(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 number of which a bf16 `high` and an int16 `low` are the halves."""
    return (high.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(low)).view(
        torch.float32
    )


def split_halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """(bf16 high, int16 low) of fp32 numbers. Ties round away from zero, which keeps `low` in 16
    bits."""
    bits = value.view(torch.int32)
    high = (bits + 0x8000).bitwise_right_shift_(16)
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def _round_stochastic(value: Tensor, generator: torch.Generator) -> Tensor:
    """bf16 below or above, with the odds that make the mean exact; what is not finite stays."""
    noise = torch.randint(
        0, 1 << 16, value.shape, generator=generator, dtype=torch.int32, device=value.device
    )
    up = (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), up, value).to(torch.bfloat16)


def update(items: list[Item], alpha: float, stochastic: bool, seed: int) -> None:
    """CPU tensors, and any layout that the kernel does not take."""
    generators: dict[torch.device, torch.Generator] = {}
    for reference, policy, remainder in items:
        device = reference.device
        if stochastic and device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        wide = torch.float64 if torch.float64 in (reference.dtype, policy.dtype) else torch.float32
        # Fresh memory for every block costs more than the arithmetic: the pages are faulted in
        # anew.
        in_place = remainder is None and reference.dtype == wide
        scratch = (
            torch.empty(min(BLOCK, reference.numel()), dtype=wide, device=device)
            if in_place
            else None
        )
        for start in range(0, reference.numel(), BLOCK):
            here = slice(start, start + BLOCK)
            ref, pol = reference[here], policy[here].to(device, wide)
            if remainder is not None:
                mixed = _mix(join_halves(ref, remainder[here]), pol.float(), alpha)
                high, low = split_halves(mixed)
                ref.copy_(high)
                remainder[here].copy_(low)
            elif stochastic and ref.dtype == torch.bfloat16:
                ref.copy_(
                    _round_stochastic(_mix(ref.to(wide), pol, alpha).float(), generators[device])
                )
            elif alpha == 1:
                ref.copy_(policy[here])
            elif scratch is not None:
                _mix(ref, pol, alpha, scratch[: ref.numel()], out=ref)
            else:
                ref.copy_(_mix(ref.to(wide), pol, alpha))
