"""A base whose matrices are held in 4 bits (QLoRA, arXiv:2305.14314) by bitsandbytes: what an
adapter needs of it is its products, made in the dtype of the run from weights that are unpacked for
each."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from fasttr.errors import FasttrError


@dataclass(frozen=True)
class Quantisation:
    """How the matrices of decoder layers are held; embeddings, norms and the head are not."""

    kind: str = "nf4"  # or fp4
    is_nested: bool = False  # the scales of blocks in 8 bits too


def check_installed() -> None:
    """Raise FasttrError without the package that holds weights in 4 bits."""
    missing = [name for name in ("bitsandbytes", "accelerate") if not _has(name)]
    if missing:
        raise FasttrError(
            f"load_in_4bit: got true without the package {missing[0]}; run pip install "
            "'fasttr[qlora]'"
        )


def arguments(quantisation: Quantisation, bf16: bool, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to hold matrices so, where they are needed from the start."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantisation.kind,
        bnb_4bit_use_double_quant=quantisation.is_nested,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantised(parameter: torch.Tensor) -> bool:
    return not parameter.is_floating_point()


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
