"""Attention over packed trees, plugged into transformers through its AttentionInterface.

The layout comes with every call as the keyword `fasttr_layout`; nothing is inferred from position
ids. Back ends: `varlen` (torch.nn.attention.varlen, CUDA, half precision), `flash` (flash-attn,
CUDA) and `segments` (scaled dot product attention, one segment at a time).

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, Dh head width, w sliding window
in tokens, itself included.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fasttr.batch import AttentionLayout
from fasttr.errors import FasttrError
from fasttr.models.gather import gather_rows
from fasttr.models.segments import attend_segments

NAME = "fasttr_packed"  # in transformers' AttentionInterface


def register() -> str:
    """Make `fasttr_packed` known to transformers and return the name.

    No mask function is registered: transformers then builds no mask at all, and does not read
    position ids back to the host in search of packed sequences.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def backend_for(asked: str | None, device: torch.device, bf16: bool) -> str:
    """`varlen`, `flash` or `segments` for an `attn_implementation`; what is missing stops."""
    if asked is None:
        return "varlen" if device.type == "cuda" and bf16 else "segments"
    if asked in ("sdpa", "eager", "segments"):
        return "segments"
    if asked not in ("varlen", "flash_attention_2"):
        raise FasttrError(
            f"attn_implementation: got {asked!r}; wanted one of sdpa, eager, varlen, "
            "flash_attention_2, or none"
        )
    if device.type != "cuda" or not bf16:
        raise FasttrError(
            f"attn_implementation: got {asked} on {device.type} with bf16 {str(bf16).lower()}; "
            "wanted a CUDA device with bf16 true; leave attn_implementation out to run everywhere"
        )
    if asked == "varlen":
        return "varlen"
    if importlib.util.find_spec("flash_attn") is None:
        raise FasttrError(
            "attn_implementation: flash_attention_2 needs the package flash-attn; run pip install "
            "'fasttr[flash]', or leave attn_implementation out to use torch's own varlen attention"
        )
    return "flash"


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, Dh)
    key: Tensor,  # (1, Hkv, T, Dh)
    value: Tensor,  # (1, Hkv, T, Dh)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fasttr_layout: AttentionLayout | None = None,
    fasttr_backend: str = "segments",
    **other: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for every attention layer; returns ((1, T, H, Dh), None)."""
    layout = _checked_layout(module, fasttr_layout, attention_mask, dropout, other)
    if sliding_window is None:
        _refuse_lost_window(module, max(layout.k_lengths))
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings and norms with fp32 weights promote q and k; v comes in bf16.
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    q = query[0].transpose(0, 1)
    k = gather_rows(key[0].transpose(0, 1), layout.keys)
    v = gather_rows(value[0].transpose(0, 1), layout.keys)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _choose(fasttr_backend, q, softcap)
    return attend(q, k, v, layout, scale, sliding_window, softcap)[None], None


def _checked_layout(
    module: nn.Module,
    layout: AttentionLayout | None,
    attention_mask: Tensor | None,
    dropout: float,
    other: dict[str, Any],
) -> AttentionLayout:
    """The layout, when the layer asks for nothing that a layout cannot say."""
    if layout is None:
        raise FasttrError(
            "attention: got no packed layout; wanted `fasttr_layout` in the call of the base model"
        )
    if attention_mask is not None:
        raise FasttrError(
            "attention: got a mask; wanted none, since the layout says what each row sees"
        )
    if dropout > 0:
        raise FasttrError(
            f"attention: got dropout {dropout}; wanted 0: policy and reference are compared "
            "without it"
        )
    if other.get("s_aux") is not None:
        raise FasttrError(
            "attention: got attention sinks (s_aux), which are not built; use a model without them"
        )
    if not getattr(module, "is_causal", True):
        raise FasttrError(
            "attention: got a layer that is not causal; wanted a causal language model"
        )
    return layout


def _refuse_lost_window(module: nn.Module, longest: int) -> None:
    """Some architectures keep their window in the mask alone, which a packed layout never sees."""
    config: Any = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if not window or longest <= window:
        return
    kinds = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if kinds is None or (layer is not None and kinds[layer] == "sliding_attention"):
        raise FasttrError(
            f"attention: layer {layer} of {config.model_type} is configured for a window of "
            f"{window} but passes none, and a sequence has {longest} tokens; lower max_length to "
            f"{window} or use another architecture"
        )


def _choose(backend: str, q: Tensor, softcap: float | None) -> Callable[..., Tensor]:
    """What each back end cannot do falls to the segments, which are exact for everything."""
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if backend == "flash" and half:
        return attend_flash
    if backend == "varlen" and half and softcap is None:
        return attend_varlen
    return attend_segments


def attend_varlen(
    q: Tensor,  # (T, H, Dh)
    k: Tensor,  # (S, Hkv, Dh)
    v: Tensor,  # (S, Hkv, Dh)
    layout: AttentionLayout,
    scale: float,
    window: int | None,
    softcap: None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if varlen_takes_grouped_heads():
            grouped = {"enable_gqa": True}
        else:
            repeat = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    out = varlen_attn(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_q,
        layout.cu_k,
        max(layout.q_lengths),
        max(layout.k_lengths),
        scale=scale,
        window_size=_window_size(window),
        **grouped,
    )
    assert isinstance(out, Tensor)  # with its log-sum-exp only when that is asked for
    return out


def attend_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: AttentionLayout,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layout.cu_q,
        layout.cu_k,
        max(layout.q_lengths),
        max(layout.k_lengths),
        softmax_scale=scale,
        causal=True,
        window_size=_window_size(window),
        softcap=softcap or 0.0,
    )


def _window_size(window: int | None) -> tuple[int, int]:
    """Tokens to the left and to the right of a query, as FlashAttention counts: without itself."""
    return (-1, 0) if window is None else (window - 1, 0)


@lru_cache(maxsize=1)
def varlen_takes_grouped_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
