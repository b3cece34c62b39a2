"""Bytes of a pack: what a forward pass leaves for its backward, and buffers that come and go.

Legend: T tokens of a pack, R predicting rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from fasttr.memory.sizes import ModelSizes
from fasttr.memory.states import BF16, FP32
from fasttr.memory.watch import Kept

FREE_BUDGET = 0.8  # from there on torch's partitioner makes no product again


class Recompute(NamedTuple):
    """What of a layer is made again in the backward."""

    compiled: bool  # layers are compiled: a partitioner decides within `budget`
    whole_layers: bool = False  # gradient checkpointing
    budget: float = 1.0  # torch's activation_memory_budget
    offloads: bool = False  # inputs of layers that are made again wait in the host's memory

    def __str__(self) -> str:
        if self.whole_layers:
            place = ", from inputs in the host's memory" if self.offloads else ""
            return f"layers made again in the backward{place}"
        if not self.compiled:
            return "all kept"
        return f"activation_memory_budget {self.budget:g}"


def kept_of_layer(kept: Kept, recompute: Recompute) -> float:
    """Bytes a token that a layer leaves for the backward.

    A budget is the share of what the partitioner would keep beyond the layer's input (torch's
    `activation_memory_budget`); operations that are no products go first.
    """
    if recompute.whole_layers:
        return 0.0 if recompute.offloads else kept.input
    if not recompute.compiled:
        return kept.eager
    if recompute.budget >= 1:
        return kept.compiled
    within = kept.input + recompute.budget * (kept.compiled - kept.input)
    return min(kept.products, within)


def kept_bytes(sizes: ModelSizes, recompute: Recompute) -> float:
    """Bytes a token that a whole forward pass leaves."""
    of_layers = sum(kind.layers * kept_of_layer(kind.kept, recompute) for kind in sizes.kinds)
    return of_layers + sizes.kept_outside


def offloaded_bytes(sizes: ModelSizes, recompute: Recompute) -> float:
    """Bytes a token that a forward pass leaves in the host's memory."""
    if not recompute.offloads:
        return 0.0
    return sum(kind.layers * kind.kept.input for kind in sizes.kinds)


def layer_working_bytes(sizes: ModelSizes, recompute: Recompute) -> float:
    """Bytes a token that the backward of one layer holds beyond what was kept: gradients of its
    activations, and what is made again."""
    largest = 0.0
    for kind in sizes.kinds:
        whole = kind.kept.compiled if recompute.compiled else kind.kept.eager
        again = whole - kept_of_layer(kind.kept, recompute)
        largest = max(largest, again + whole / 2)
    return largest


def head_working_bytes(sizes: ModelSizes, bf16: bool) -> float:
    """Bytes a token around the head: last hidden states, predicting rows (at most all) and their
    cast, dX, and dX at its places among all rows."""
    return sizes.hidden * (FP32 * 4 + (BF16 if bf16 else 0))


class Head(NamedTuple):
    """Buffers of the fused head that do not grow with a pack."""

    logits: float  # of a chunk of rows, and their gradient in bf16
    weight: float  # a bf16 copy of an fp32 weight


def head_bytes(sizes: ModelSizes, chunk_rows: int, bf16: bool, *, splits: bool) -> Head:
    """Of `fasttr_kernels.linear_preference_loss`: fp32 logits of a chunk of `chunk_rows` rows."""
    logits = (FP32 + (BF16 if bf16 else 0)) * chunk_rows * sizes.vocabulary
    is_half = splits and not sizes.is_tied
    return Head(logits, BF16 * sizes.head_weights if bf16 and not is_half else 0)


def embedding_gradient_bytes(sizes: ModelSizes, *, adds_packs: bool) -> float:
    """The dense fp32 gradient of the embedding, beside the one that it is added to."""
    beside = adds_packs or sizes.is_tied
    return FP32 * sizes.vocabulary * sizes.hidden if beside else 0.0
