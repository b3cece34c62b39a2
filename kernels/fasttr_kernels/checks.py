"""Argument checks shared by the ops. Every error says what was got, what is wanted, and the
remedy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALLOWED = (torch.bfloat16, torch.float32, torch.float64)


def fail(name: str, got: object, wanted: str, remedy: str) -> ValueError:
    return ValueError(f"{name}: got {got}; wanted {wanted}; {remedy}")


def head(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check the four tensors of a head and return the dtype its products are made in."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if is_sharded(x):
            raise fail(
                name,
                f"a DTensor with placements {getattr(x, 'placements', None)}",
                "a plain tensor",
                "unshard the module that owns it first, shard it in the root group, whose "
                "parameters are whole during the forward, or pass fasttr.integrations.whole() of "
                "it",
            )
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


def is_sharded(x: Any) -> bool:
    """Whether this is a DTensor; asked of the object, so that nothing distributed is imported."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def placement(x: Tensor) -> tuple[object, object] | None:
    """How a DTensor lies on its mesh; None for a plain tensor."""
    return (x.placements, x.device_mesh) if is_sharded(x) else None  # type: ignore[attr-defined]


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


def cast_weight(cast: Tensor | None, weight: Tensor, compute: torch.dtype) -> None:
    if cast is not None:
        _like_weight("cast_weight", cast, weight, compute, "pass weight.detach().to() of it")


def weight_grad(grad: Tensor | None, weight: Tensor, wide: torch.dtype) -> None:
    if grad is None:
        return
    _like_weight("weight_grad", grad, weight, wide, "start from torch.zeros_like with that dtype")
    if grad.requires_grad or not weight.requires_grad:
        raise fail(
            "weight_grad",
            "a buffer that requires grad" if grad.requires_grad else "a frozen weight",
            "a plain buffer beside a weight that requires grad",
            "pass None for a frozen weight",
        )


def _like_weight(name: str, x: Tensor, weight: Tensor, dtype: torch.dtype, remedy: str) -> None:
    if is_sharded(x) or (x.shape, x.dtype, x.device) != (weight.shape, dtype, weight.device):
        raise fail(
            name,
            f"{type(x).__name__} {tuple(x.shape)}, {x.dtype} on {x.device}",
            f"a plain tensor {tuple(weight.shape)}, {dtype} on {weight.device}",
            remedy,
        )


def outside_backward() -> None:
    """Refuse to add to a buffer inside a backward, where a checkpoint runs its forward again."""
    if torch._C._current_graph_task_id() != -1:
        raise fail(
            "weight_grad",
            "a call inside a backward, as a checkpoint makes",
            "one call for one backward",
            "keep the head out of the checkpoint, or pass None: dW would be added twice",
        )


def unit_gradient(d_loss: Tensor) -> None:
    """A buffer that already holds dW cannot be scaled. On a GPU the device looks."""
    if d_loss.device.type != "cpu":
        torch._assert_async(d_loss == 1, "weight_grad: the gradient of the loss must be 1")
    elif d_loss != 1:
        raise fail(
            "weight_grad",
            f"a gradient of the loss of {float(d_loss)}",
            "1",
            "put factors of the loss into normalizer",
        )


def completions(cu: Tensor | None, lengths: Sequence[int] | None, rows: int) -> list[int]:
    """Row offsets of the completions, from either form."""
    if (cu is None) == (lengths is None):
        raise fail(
            "cu_completions",
            "neither it nor lengths" if cu is None else "both it and lengths",
            "one of the two",
            "pass the rows of each completion as lengths",
        )
    if lengths is None:
        return offsets("cu_completions", cu, rows, "every row of hidden")
    if isinstance(lengths, Tensor) or any(n < 0 for n in lengths) or sum(lengths) != rows:
        got = "a tensor" if isinstance(lengths, Tensor) else f"{list(lengths)[:8]}"
        raise fail(
            "lengths", got, f"host ints of at least 0 with sum {rows}", "count the rows of hidden"
        )
    return list(itertools.accumulate(lengths, initial=0))


def groups(cu: Tensor | int, completions: int) -> list[int]:
    """Completion offsets of the groups, from either form."""
    if isinstance(cu, int) and not isinstance(cu, bool):
        if cu < 1 or completions % cu:
            raise fail(
                "cu_groups",
                f"groups of {cu} for {completions} completions",
                "a size that divides them",
                "pass host offsets for groups of unequal size",
            )
        return list(range(0, completions + 1, cu))
    return offsets("cu_groups", cu, completions, "every completion")


def preference(
    ref_logp: Tensor | None,
    shape: tuple[int],
    device: torch.device,
    normalizer: float,
    chunk_rows: int | None,
) -> None:
    if ref_logp is not None and (ref_logp.shape != shape or ref_logp.device != device):
        raise fail(
            "ref_logp",
            f"shape {tuple(ref_logp.shape)} on {ref_logp.device}",
            f"{shape} on {device}",
            "one summed log-prob for each completion",
        )
    if isinstance(normalizer, bool | Tensor) or not (math.isfinite(normalizer) and normalizer > 0):
        raise fail(
            "normalizer",
            normalizer,
            "a host number above 0, or None",
            "pass the step's count of groups",
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise fail(
            "chunk_rows", chunk_rows, "at least 1, or None", "None takes the measured default"
        )


def loss_fn(loss_fn: object, reads: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(reads) - set(known))
    if unknown:
        raise fail("loss_reads", unknown, f"names among {sorted(known)}", "drop the others")
    if isinstance(loss_fn, nn.Module) and next(loss_fn.parameters(), None) is not None:
        raise fail(
            "loss_fn",
            "a module with parameters",
            "a function without parameters",
            "its parameters would get no gradient: compute that term outside",
        )


def offsets(name: str, offset: object, last: int, of: str) -> list[int]:
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
