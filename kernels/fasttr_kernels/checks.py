"""Argument checks shared by the ops. Every error says what was got, what is wanted, and the
remedy."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

ALLOWED = (torch.bfloat16, torch.float32, torch.float64)


def fail(name: str, got: object, wanted: str, remedy: str) -> ValueError:
    return ValueError(f"{name}: got {got}; wanted {wanted}; {remedy}")


def head(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check the four tensors of a head and return the dtype its products are made in."""
    if hidden.dim() != 2:
        raise fail(
            "hidden", f"shape {tuple(hidden.shape)}", "(T, D)", "flatten it, keep scored rows"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise fail(
            "weight",
            f"shape {tuple(weight.shape)}",
            f"(V, {hidden.shape[1]})",
            "pass the head's weight",
        )
    if weight.shape[0] == 0:
        raise fail("weight", "an empty vocabulary", "V >= 1", "pass the head's weight")
    if target.shape != hidden.shape[:1]:
        raise fail(
            "target",
            f"shape {tuple(target.shape)}",
            f"({hidden.shape[0]},)",
            "one vocabulary id for each row",
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise fail("target", target.dtype, "int64 or int32", "convert with .long()")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise fail(
            "bias",
            f"shape {tuple(bias.shape)}",
            f"({weight.shape[0]},)",
            "one value for each vocabulary id",
        )
    for name, x in (("weight", weight), ("target", target), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise fail(
                name,
                x.device,
                f"the device of hidden, {hidden.device}",
                "move it with .to(hidden.device)",
            )
    return compute_dtype(hidden, weight, bias)


def compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Autocast's dtype where it is on and applies, else the common dtype of the arguments."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and x.dtype not in ALLOWED:
            raise fail(
                name,
                x.dtype,
                "bfloat16, float32 or float64",
                "float16 underflows in dZ: use bfloat16",
            )
    kind = hidden.device.type
    if (
        torch.is_autocast_enabled(kind)
        and hidden.dtype != torch.float64
        and weight.dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(kind)
        if dtype not in ALLOWED:
            raise fail(
                "autocast",
                dtype,
                "bfloat16",
                "float16 underflows in the gradient: use dtype=torch.bfloat16",
            )
        return dtype
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise fail(
                name,
                x.dtype,
                f"the dtype of hidden, {hidden.dtype}",
                "convert it, or use torch.autocast",
            )
    return hidden.dtype


def head_options(logit_scale: float, softcap: float | None) -> None:
    if not (math.isfinite(logit_scale) and logit_scale != 0):
        raise fail(
            "logit_scale",
            logit_scale,
            "a finite number other than 0",
            "1.0 leaves the logits as they are",
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise fail(
            "softcap", softcap, "a number above 0, or None", "None leaves the logits as they are"
        )


def target_range(target: Tensor, vocab: int) -> None:
    """Ids outside the vocabulary, where looking costs no wait for a device."""
    if target.device.type == "cpu" and target.numel():
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= vocab:
            raise fail("target", f"ids {low}..{high}", f"0..{vocab - 1}", "pass scored rows alone")


def offsets(name: str, offset: Tensor, last: int, of: str) -> list[int]:
    """Host offsets as a list, checked to cover 0..last without going back."""
    if not isinstance(offset, Tensor) or offset.dim() != 1 or offset.numel() < 1:
        got = tuple(offset.shape) if isinstance(offset, Tensor) else type(offset).__name__
        raise fail(name, got, "a 1-d tensor that starts at 0", "build it with a cumulative sum")
    if offset.device.type != "cpu":
        raise fail(
            name,
            offset.device,
            "a host tensor",
            "keep it on the CPU: chunks are cut with host integers",
        )
    if offset.dtype not in (torch.int64, torch.int32):
        raise fail(name, offset.dtype, "int64 or int32", "convert with .long()")
    host: list[int] = offset.tolist()
    if host[0] != 0 or host[-1] != last:
        raise fail(name, f"{host[0]}..{host[-1]}", f"0..{last}", f"the offsets must cover {of}")
    if any(b < a for a, b in itertools.pairwise(host)):
        raise fail(
            name, "offsets that decrease", "offsets in order", "build it with a cumulative sum"
        )
    return host
