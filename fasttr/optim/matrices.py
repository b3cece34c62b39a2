"""Which weights of a model are read in bf16 by every call that computes in it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def matrices(model: Any) -> set[nn.Parameter]:
    """The trainable matrices of the decoder layers, those of experts too, and that of a head that
    is no embedding.

    Embeddings, norms, biases, routers and convolutions are not among them: they are small, or what
    reads them computes in fp32.
    """
    return {p for p in all_matrices(model) if p.requires_grad}


def all_matrices(model: Any) -> set[nn.Parameter]:
    """Those of `matrices`, and frozen ones."""
    stacks = [part for part in model.base_model.modules() if isinstance(part, nn.ModuleList)]
    head = model.get_output_embeddings()  # a reward model has none
    found = set() if head is None else {head.weight}
    for part in (part for stack in stacks for part in stack.modules()):
        own = dict(part.named_parameters(recurse=False))
        if _is_linear(part):
            found.add(own["weight"])
        elif not _is_convolution(part):
            # Experts are products with one tensor for all: (experts, in, out).
            found |= {p for p in own.values() if p.ndim == 3}
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    return found.difference(tables)


def size_of(parameter: Tensor) -> int:
    """How many weights a parameter holds; of a packed one two are in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _is_linear(part: nn.Module) -> bool:
    """GPT-2's linear layers are called Conv1D."""
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"


def _is_convolution(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv1d | nn.Conv2d)
