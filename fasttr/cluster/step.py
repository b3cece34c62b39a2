"""A model of a step's time: counted operations and bytes over rates.

Operations follow from shapes; the bytes that a layer moves outside its products and attention were
counted on a Llama layer on a CPU and are used for every architecture. Nothing here was measured on
a GPU; times are worth some 12 % either way.

Legend: P parameters, T packed tokens, R predicting rows, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fasttr.cluster.rates import Machine
from fasttr.memory.activations import Recompute
from fasttr.memory.shapes import SHAPES, Shape
from fasttr.memory.sizes import ModelSizes


class Model(NamedTuple):
    """A model as far as its operations go."""

    product_weights: int  # of all layers, that a token is multiplied with
    head_weights: int
    attention_width: int  # multiplications a query and key, of all layers
    units: int  # D L: what elementwise work goes by
    vocabulary: int
    parameters: int
    trained_share: float = 1.0  # of the weights of products: an adapter's base has no gradient

    @classmethod
    def of(cls, shape: Shape) -> Model:
        return cls(
            product_weights=shape.layers * shape.layer_weights,
            head_weights=shape.head_weights,
            attention_width=2 * shape.heads * shape.head_dim * shape.layers,
            units=shape.hidden * shape.layers,
            vocabulary=shape.vocabulary,
            parameters=shape.parameters,
        )

    @classmethod
    def of_sizes(cls, sizes: ModelSizes) -> Model:
        held = sizes.parameters
        return cls(
            product_weights=sizes.product_weights,
            head_weights=sizes.head_weights,
            attention_width=sizes.attention_width,
            units=sizes.hidden * sizes.layers,
            vocabulary=sizes.vocabulary,
            parameters=held.all,
            trained_share=1.0 if held.frozen_half + held.frozen_whole == 0 else 0.0,
        )


class Work(NamedTuple):
    """What a step of rows has to do."""

    rows: float
    tokens: float  # T
    predicting: float  # R
    attended: float  # pairs of a query with a key that it sees

    @classmethod
    def of_pairs(cls, rows: int, prompt: int, completion: int) -> Work:
        """Of pairs whose prompts and completions have the same lengths."""
        whole = prompt + completion
        attended = 2 * causal(whole) - causal(prompt)
        return cls(rows, rows * (prompt + 2 * completion), rows * 2 * completion, rows * attended)

    def over(self, ranks: int) -> Work:
        """An even share of it."""
        return Work(*(x / ranks for x in self))


def causal(length: int) -> int:
    """Pairs of a query with a key before it, or itself."""
    return length * (length + 1) // 2


class Elementwise(NamedTuple):
    """Bytes that a layer moves outside products and attention, a token and unit of D."""

    forward: float
    backward: float

    @classmethod
    def counted(cls, forward_gb: float, backward_gb: float) -> Elementwise:
        """From gigabytes of one layer of llama-3-8b at 16,384 tokens."""
        units = 16384 * SHAPES["llama-3-8b"].hidden
        return cls(forward_gb * 1e9 / units, backward_gb * 1e9 / units)


# fp32 weights under autocast, eager; casts of weights are counted apart, a parameter and pack.
EAGER = Elementwise.counted(12.7, 30.2)
# bf16 matrices, fp32 residual and norms, fused by a compiler.
COMPILED = Elementwise.counted(4.4, 7.1)


class Stage(NamedTuple):
    """How a step is done."""

    name: str
    elementwise: Elementwise
    products_again: float  # share of the forward's products made again in the backward
    elementwise_again: float
    sweep: float  # bytes a parameter and step: optimizer, gradient norm, clipping
    each_pack: float  # bytes a parameter and pack: casts of weights and gradients, accumulation
    pack_tokens: int
    head_backward: float = 1.0  # share of the head's backward products that is done
    attention_speed: float = 1.0
    casts: float = 0.0  # bytes a parameter and scoring: casts of fp32 weights


class Again(NamedTuple):
    """What is made again, as shares of a layer's forward."""

    products: float
    elementwise: float


# By `activation_memory_budget`, as torch's partitioner chose on a Llama layer.
_AGAIN = {1.0: Again(0, 0), 0.8: Again(0, 0.5), 0.4: Again(0.27, 1), 0.2: Again(0.54, 1)}
ALL_AGAIN = Again(0.73, 1)  # all but the last product, whose output nothing reads


def again(recompute: Recompute) -> Again:
    """For a budget between two of the table, the lower one."""
    if recompute.whole_layers:
        return ALL_AGAIN
    known = [budget for budget in _AGAIN if budget <= recompute.budget]
    return _AGAIN[max(known)] if known else ALL_AGAIN


LOGIT_BYTES = 18  # written, read by both sweeps, dZ written, and read by two products
ONE_SWEEP_LOGIT_BYTES = 8  # log-probs alone


class Seconds(NamedTuple):
    """Where the time of a step goes."""

    products: float
    elementwise: float
    attention: float
    head: float
    sweep: float
    packs: float

    @property
    def total(self) -> float:
        return sum(self)


def step_seconds(model: Model, work: Work, stage: Stage, machine: Machine) -> Seconds:
    """One optimizer step of one card; the reference's log-probs are there already."""
    units = work.tokens * model.units
    moved = stage.elementwise.forward * (1 + stage.elementwise_again) + stage.elementwise.backward
    head_products = 2 + (2 + 2 * model.trained_share) * stage.head_backward
    packs = math.ceil(work.tokens / stage.pack_tokens)
    attention_rate = machine.attention * stage.attention_speed
    attended_again = 1 if stage.products_again else 0
    passes = 2 + model.trained_share + stage.products_again
    return Seconds(
        products=_layer_products(model, work) * passes / machine.products,
        elementwise=units * moved / machine.memory,
        attention=_attention(model, work) * (3.5 + attended_again) / attention_rate,
        head=work.predicting
        * (
            head_products * model.head_weights / machine.products
            + LOGIT_BYTES * model.vocabulary / machine.memory
        ),
        sweep=stage.sweep * model.parameters / machine.memory,
        packs=packs * stage.each_pack * model.parameters / machine.memory,
    )


def scoring_seconds(model: Model, work: Work, stage: Stage, machine: Machine) -> float:
    """The reference's log-probs of a step's rows."""
    units = work.tokens * model.units
    products = _layer_products(model, work) + 2 * work.predicting * model.head_weights
    moved = units * stage.elementwise.forward
    moved += ONE_SWEEP_LOGIT_BYTES * work.predicting * model.vocabulary
    moved += stage.casts * model.parameters
    return (
        products / machine.products
        + _attention(model, work) / machine.attention
        + moved / machine.memory
    )


def _layer_products(model: Model, work: Work) -> float:
    """Operations of the forward's products in all layers."""
    return 2.0 * model.product_weights * work.tokens


def _attention(model: Model, work: Work) -> float:
    """Operations of the forward's attention in all layers."""
    return 2.0 * work.attended * model.attention_width


def useful_operations(model: Model, work: Work) -> float:
    """What MFU counts: forward and backward once, without the reference."""
    passes = 2 + model.trained_share
    head = 2 * passes * work.predicting * model.head_weights
    return passes * _layer_products(model, work) + 3 * _attention(model, work) + head
