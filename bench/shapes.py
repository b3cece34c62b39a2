"""Sizes of models for all benchmarks: the published ones and toys, and how to build one with random
weights."""

from __future__ import annotations

from typing import Any

import torch

from fasttr.memory.shapes import SHAPES as PUBLISHED
from fasttr.memory.shapes import Shape

SHAPES = {
    "tiny": Shape(400, 32, 2, 4, 4, 128),
    "tiny-neox": Shape(400, 64, 2, 4, 4, 256, arch="gpt_neox"),
    "10m": Shape(8000, 256, 8, 4, 4, 704),
    **PUBLISHED,
}
# Short names of the sizes that whole trainers are compared at.
SIZES = {
    "tiny": "tiny",
    "10m": "10m",
    "1b": "llama-3.2-1b",
    "3b": "llama-3.2-3b",
    "8b": "llama-3-8b",
}


def build(shape: Shape, device: torch.device, *, layers: int | None = None, seed: int = 0) -> Any:
    """A transformers model with random fp32 weights, made where it is to be."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape.config(layers=layers), dtype=torch.float32)
