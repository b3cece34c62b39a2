"""A model of a step's time and a device's memory: counted operations and bytes over stated rates.

Nothing here was measured on a GPU. Operations follow from shapes; the bytes that a layer moves
outside its products and attention, and keeps for the backward, were counted on a Llama layer on a
CPU and are used for every architecture. Times are worth some 12 % either way.

Legend: P parameters, T packed tokens, R predicting rows, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from bench.lengths import make_trees, packed_tokens
from bench.shapes import SHAPES, Shape
from bench.text import titled

PAIRS = 64  # of a step
SAMPLE = 2048  # pairs that mean lengths are taken over


class Machine(NamedTuple):
    """Rates that are sustained, a second."""

    name: str
    products: float  # operations of large bf16 products
    memory: float  # bytes
    attention: float  # operations of attention over short segments
    peak: float  # operations that MFU is a share of
    memory_bytes: float


H200 = Machine("H200", 700e12, 3.7e12, 250e12, 989e12, 143771 * 2**20)
SLOW_H200 = Machine("H200, slower", 620e12, 3.2e12, 150e12, 989e12, 143771 * 2**20)
GPU_48 = H200._replace(name="48 GB", memory_bytes=48e9)
GPU_24 = H200._replace(name="24 GB", memory_bytes=24e9)
USABLE = 0.975  # of a device's memory: the rest is the context's, and holes


class Work(NamedTuple):
    """What a step of pairs has to do."""

    pairs: int
    tokens: int  # T
    predicting: int  # R
    attended: int  # pairs of a query with a key that it sees

    @classmethod
    @lru_cache
    def of(cls, lengths: str, pairs: int = PAIRS) -> Work:
        """Of mean pairs of a data set."""
        trees = make_trees(lengths, SAMPLE, vocabulary=8)
        tokens = predicting = attended = 0
        for tree in trees:
            prompt = len(tree.prompt_ids)
            chosen, rejected = (len(ids) for ids in tree.completions)
            tokens += packed_tokens(tree)
            predicting += chosen + rejected
            attended += _causal(prompt + chosen) + _causal(prompt + rejected) - _causal(prompt)
        scale = pairs / SAMPLE
        return cls(pairs, *(round(x * scale) for x in (tokens, predicting, attended)))


def _causal(length: int) -> int:
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


# Adam 28, norm 4, clipping 8; weights cast twice, gradients cast and accumulated.
EAGER_FP32 = Stage(
    "0 fp32 weights, eager, full checkpointing, packs of 8k", EAGER, 0.73, 1.0, 40, 30, 8192
)
SPLIT = EAGER_FP32._replace(name="1 split weights, one optimizer sweep", sweep=32, each_pack=10)
FUSED = SPLIT._replace(name="2 compiled layers", elementwise=COMPILED)
KEPT = FUSED._replace(
    name="3 memory so freed spent on not recomputing",
    products_again=0.0,
    elementwise_again=0.5,
    pack_tokens=13000,
)
SPARSE = KEPT._replace(
    name="4 sparse head backward, attention twice as fast", head_backward=0.2, attention_speed=2.0
)
STAGES = (EAGER_FP32, SPLIT, FUSED, KEPT, SPARSE)
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


def step_seconds(shape: Shape, work: Work, stage: Stage, machine: Machine) -> Seconds:
    """One optimizer step; the reference's log-probs are there already."""
    units = work.tokens * shape.hidden * shape.layers
    moved = stage.elementwise.forward * (1 + stage.elementwise_again) + stage.elementwise.backward
    head_products = 2 + 4 * stage.head_backward
    packs = math.ceil(work.tokens / stage.pack_tokens)
    attention_rate = machine.attention * stage.attention_speed
    again = 1 if stage.products_again else 0
    return Seconds(
        products=_layer_products(shape, work) * (3 + stage.products_again) / machine.products,
        elementwise=units * moved / machine.memory,
        attention=_attention(shape, work) * (3.5 + again) / attention_rate,
        head=work.predicting
        * (
            head_products * shape.head_weights / machine.products
            + LOGIT_BYTES * shape.vocabulary / machine.memory
        ),
        sweep=stage.sweep * shape.parameters / machine.memory,
        packs=packs * stage.each_pack * shape.parameters / machine.memory,
    )


def scoring_seconds(shape: Shape, work: Work, stage: Stage, machine: Machine) -> float:
    """The reference's log-probs of a step's pairs."""
    units = work.tokens * shape.hidden * shape.layers
    products = _layer_products(shape, work) + 2 * work.predicting * shape.head_weights
    moved = units * stage.elementwise.forward
    moved += ONE_SWEEP_LOGIT_BYTES * work.predicting * shape.vocabulary
    casts = 6 * shape.parameters if stage is EAGER_FP32 else 0
    return (
        products / machine.products
        + _attention(shape, work) / machine.attention
        + (moved + casts) / machine.memory
    )


def layer_seconds(
    shape: Shape, tokens: int, elementwise: Elementwise, casts: bool, machine: Machine
) -> tuple[float, float]:
    """Forward and backward of one layer, nothing made again; attention, which is small, apart."""
    forward = 2 * shape.layer_weights * tokens / machine.products
    units = tokens * shape.hidden
    cast = 6 * shape.layer_weights if casts else 0
    return (
        forward + (units * elementwise.forward + cast) / machine.memory,
        2 * forward + (units * elementwise.backward + cast) / machine.memory,
    )


def _layer_products(shape: Shape, work: Work) -> float:
    """Operations of the forward's products in all layers."""
    return 2.0 * shape.layers * shape.layer_weights * work.tokens


def _attention(shape: Shape, work: Work) -> float:
    """Operations of the forward's attention in all layers."""
    return 4.0 * work.attended * shape.heads * shape.head_dim * shape.layers


def useful_operations(shape: Shape, work: Work) -> float:
    """What MFU counts: forward and backward once, without the reference."""
    head = 6.0 * work.predicting * shape.head_weights
    return 3 * _layer_products(shape, work) + 3 * _attention(shape, work) + head


def mfu(shape: Shape, work: Work, stage: Stage, machine: Machine) -> float:
    seconds = step_seconds(shape, work, stage, machine).total
    return useful_operations(shape, work) / seconds / machine.peak


class Storage(NamedTuple):
    """What a parameter costs while it is trained."""

    name: str
    bytes: float


STORAGES = (
    Storage("fp32 weights, gradients, moments, bf16 casts", 18),
    Storage("split, fp32 gradients, fp32 moments", 16),
    Storage("split, bf16 gradients (one pack a step), fp32 moments", 14),
    Storage("split, fp32 gradients, bf16 moments", 12),
    Storage("split, bf16 gradients, bf16 moments", 10),
    Storage("split, bf16 gradients, 8-bit moments", 8.06),
    Storage("split, gradients on the host, 8-bit moments", 6.06),
    Storage("bf16 stochastic, gradients on the host, 8-bit moments", 4.06),
)
# Bytes a token, layer and unit of D that a compiled layer keeps, by `activation_memory_budget`.
KEPT_BYTES = {"0.8": 25, "0.2": 9}
LOGIT_BUFFER = 2**31 * 1.5  # fp32 logits of a chunk, and dZ in bf16
LEAST_TOKENS = 1000  # below that no pack is worth making


def tokens_that_fit(shape: Shape, storage: Storage, kept: float, machine: Machine) -> int:
    """Tokens of the largest pack, 0 where the states alone leave no room."""
    head = LOGIT_BUFFER + 4 * shape.head_weights
    free = USABLE * machine.memory_bytes - storage.bytes * shape.parameters - head
    tokens = free / (kept * shape.hidden * shape.layers)
    return int(tokens) if tokens >= LEAST_TOKENS else 0


STEP_SIZES = ("llama-3-8b", "pythia-2.8b")
STEP_LENGTHS = {"hh": "HH-RLHF", "ultrafeedback": "UltraFeedback"}
MEMORY_CASES = (
    ("llama-3-8b", H200),
    ("pythia-2.8b", GPU_48),
    ("pythia-2.8b", GPU_24),
    ("llama-3.2-1b", GPU_24),
)


def tables() -> str:
    """Both tables, as the README shows them."""
    return step_table() + "\n\n" + memory_table()


def step_table() -> str:
    cases = [(size, lengths) for size in STEP_SIZES for lengths in STEP_LENGTHS]
    columns = ["after change"]
    for size, lengths in cases:
        tokens = Work.of(lengths).tokens / 1e3
        columns.append(f"{size}, {STEP_LENGTHS[lengths]}, {tokens:.1f}k tokens")
    rows = [[stage.name, *(_step_cell(*case, stage, H200) for case in cases)] for stage in STAGES]
    rows.append(
        [
            f"3 at {SLOW_H200.products / 1e12:.0f} TFLOP/s, {SLOW_H200.memory / 1e12:.1f} TB/s, "
            "slow attention",
            *(_step_cell(*case, KEPT, SLOW_H200) for case in cases),
        ]
    )
    rows.append(
        [
            "pairs/s with a moving reference, 0 -> 3",
            *(f"{_rate(*case, EAGER_FP32):.1f} -> {_rate(*case, KEPT):.1f}" for case in cases),
        ]
    )
    title = (
        f"Model, not a measurement: a step of {PAIRS} pairs on an H200, ms and MFU without the "
        f"reference, at {H200.products / 1e12:.0f} TFLOP/s and {H200.memory / 1e12:.1f} TB/s. "
        "With fp32 weights 8B does not fit (next table)."
    )
    return titled(title, columns, rows)


def _step_cell(size: str, lengths: str, stage: Stage, machine: Machine) -> str:
    shape, work = SHAPES[size], Work.of(lengths)
    seconds = step_seconds(shape, work, stage, machine).total
    return f"{seconds * 1e3:,.0f}, {mfu(shape, work, stage, machine):.0%}"


def _rate(size: str, lengths: str, stage: Stage) -> float:
    shape, work = SHAPES[size], Work.of(lengths)
    step = step_seconds(shape, work, stage, H200).total
    return work.pairs / (step + scoring_seconds(shape, work, stage, H200))


def memory_table() -> str:
    columns = ["setting", "B a parameter", "8B, GB"]
    columns += [f"{size} on {machine.name}, tokens a pack" for size, machine in MEMORY_CASES]
    rows = []
    for storage in STORAGES:
        states = storage.bytes * SHAPES["llama-3-8b"].parameters / 1e9
        cells = [_tokens_cell(SHAPES[size], storage, machine) for size, machine in MEMORY_CASES]
        rows.append([storage.name, f"{storage.bytes:g}", f"{states:.1f}", *cells])
    title = (
        "Model, not a measurement: tokens of a pack that fit beside the states, compiled layers, "
        "at activation budget 0.8 / 0.2."
    )
    return titled(title, columns, rows)


def _tokens_cell(shape: Shape, storage: Storage, machine: Machine) -> str:
    tokens = [tokens_that_fit(shape, storage, kept, machine) for kept in KEPT_BYTES.values()]
    if not any(tokens):
        return "none"
    return " / ".join(f"{n / 1e3:.0f}k" if n else "none" for n in tokens)
