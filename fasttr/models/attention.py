"""Attention over packed trees, plugged into transformers through its AttentionInterface.

The layout comes with every call as the keyword `fasttr_layout`; nothing is inferred from position
ids. Back ends: `varlen` (the FlashAttention inside torch, CUDA, half precision), `flash`
(flash-attn, CUDA) and `segments` (any device, one segment at a time).

Legend: T packed rows, H heads, Hkv key heads, Dh and Dv head widths.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from fasttr.batch import AttentionLayout
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.models.attend import attend
from fasttr.models.backend import Scores

NAME = "fasttr_packed"  # in transformers' AttentionInterface


def register() -> str:
    """Make `fasttr_packed` known to transformers and return the name.

    No mask function is registered: transformers then builds no mask at all, and does not read
    position ids back to the host in search of packed sequences.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME


def own_attention(model: Any, asked: str | None = None) -> str:
    """transformers' own attention for a model: SDPA has no soft cap on scores and would lose it."""
    if asked in ("eager", "flash_attention_2"):
        return asked
    has_softcap = getattr(model.config, "attn_logit_softcapping", None)
    return "eager" if has_softcap or not model._supports_sdpa else "sdpa"


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


def announce_slow(config: Any, backend: str) -> None:
    """Say, before a run, where a model goes segment by segment though FlashAttention was chosen, as
    far as its config tells."""
    text = config.get_text_config()
    reason = None
    if backend == "varlen" and getattr(text, "attn_logit_softcapping", None):
        reason = (
            "torch's FlashAttention has no soft cap on scores; pip install 'fasttr[flash]' and set "
            "attn_implementation flash_attention_2"
        )
    elif backend != "segments" and not _fits(*_widths(text)):
        reason = f"FlashAttention has no heads of width {_widths(text)[0]}"
    if reason is not None:
        say(f"attention: segment by segment, which is slow on a GPU: {reason}")


def _widths(text: Any) -> tuple[int, int]:
    """Of queries and keys, and of values."""
    latent = getattr(text, "qk_nope_head_dim", None)
    if latent is not None:
        return latent + text.qk_rope_head_dim, text.v_head_dim
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return width, width


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, H, T, Dh)
    key: Tensor,  # (1, Hkv, T, Dh)
    value: Tensor,  # (1, Hkv, T, Dv)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,) attention sinks
    fasttr_layout: AttentionLayout | None = None,
    fasttr_backend: str = "segments",
    **other: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for every attention layer; returns ((1, T, H, Dv), None)."""
    layout = _checked_layout(module, fasttr_layout, attention_mask, dropout)
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings and norms with fp32 weights promote q and k; v comes in bf16.
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scores = Scores(float(scale), sliding_window or 0, softcap or 0.0)
    backend = _able(fasttr_backend, q, v, scores)
    return attend(q, k, v, layout, scores, backend, s_aux)[None], None


def _checked_layout(
    module: nn.Module,
    layout: AttentionLayout | None,
    attention_mask: Tensor | None,
    dropout: float,
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
    if not getattr(module, "is_causal", True):
        raise FasttrError(
            "attention: got a layer that is not causal; wanted a causal language model"
        )
    return layout


def _able(backend: str, q: Tensor, v: Tensor, scores: Scores) -> str:
    """What FlashAttention cannot do falls to the segments, which are exact for everything."""
    is_half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if not is_half or not _fits(q.shape[2], v.shape[2]) or (scores.softcap and backend == "varlen"):
        return "segments"
    return backend


def _fits(width: int, width_of_values: int) -> bool:
    """Whether FlashAttention has kernels for heads of these widths."""
    return width % 8 == 0 and width_of_values <= width <= 256
