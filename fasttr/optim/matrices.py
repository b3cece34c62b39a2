"""Which weights of a model are read in bf16 by every call that computes in it."""

from __future__ import annotations

from typing import Any

from torch import nn


def matrices(model: Any) -> set[nn.Parameter]:
    """The trainable matrices of the decoder layers, and that of a head that is no embedding too.

    Embeddings, norms and biases are not among them: what reads those computes in fp32.
    """
    stacks = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList)]
    found = {p for stack in stacks for p in stack.parameters() if p.ndim >= 2}
    found.add(model.get_output_embeddings().weight)
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    return {p for p in found.difference(tables) if p.requires_grad}
