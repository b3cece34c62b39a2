"""Kernels of liger-kernel inside a model: norms, rotary embeddings and MLPs."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch

from fasttr.errors import FasttrError


def is_wanted(asked: bool | None, device: torch.device, model_type: str) -> bool:
    """What was asked for; else: there is a GPU, the package, and kernels of that architecture."""
    if asked is not None:
        return asked
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    return model_type in _functions()


def patch(model: Any) -> None:
    """Liger's norm, rotary and MLP kernels; never its losses, which the fused head replaces."""
    apply = _functions().get(model.config.model_type)
    if apply is None:
        raise FasttrError(
            f"use_liger_kernel: liger-kernel has none for {model.config.model_type}; set it to "
            "false"
        )
    wanted = {
        "rope": True,
        "rms_norm": True,
        "layer_norm": True,
        "swiglu": True,
        "geglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    accepted = inspect.signature(apply).parameters
    apply(model=model, **{key: value for key, value in wanted.items() if key in accepted})


def _functions() -> dict[str, Any]:
    """The functions of liger-kernel that patch a model, by architecture."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise FasttrError(
            "use_liger_kernel: needs the package liger-kernel; run pip install 'fasttr[cuda]'"
        ) from error
    return MODEL_TYPE_TO_APPLY_LIGER_FN
