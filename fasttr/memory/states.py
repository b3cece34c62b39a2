"""Bytes of what a run holds from its first step to its last: weights, gradients, moments, and a
reference.

Everything counts weights of one rank; `shard` is among how many ranks each of them lies in parts.
"""

from __future__ import annotations

from typing import NamedTuple

from fasttr.memory.sizes import ModelSizes, Parameters

FP32, BF16, INT16 = 4, 2, 2  # bytes

# Of both moments of AdamW: `fasttr_kernels.SplitAdamW`; int8 has an fp32 scale for 128 values.
MOMENT_BYTES = {"fp32": 8.0, "bf16": 4.0, "int8": 2 + 2 * 4 / 128}
# Of other optimizers, by transformers' names: what their classes make in a first step. torchao's
# blocks of 256 (8-bit) and 128 (4-bit) have an fp32 scale each. Adafactor's factors of a matrix
# and the step counters are a thousandth of it.
STATE_BYTES = {
    "adamw_torch_8bit": 2 + 2 * 4 / 256,
    "adamw_8bit": 2 + 2 * 4 / 256,
    "adamw_bnb_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "adamw_torch_4bit": 1 + 2 * 4 / 128,
    "adafactor": 0.0,
    "sgd": 0.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
}
STATE_OF_ARGUMENT = {"momentum": 4.0, "centered": 4.0}  # what `optim_args` adds to sgd and rmsprop


class Storage(NamedTuple):
    """How weights are held while they are trained."""

    bf16: bool  # the run computes in bfloat16
    is_adamw: bool  # the one that steps bf16 weights; else all that is trained is fp32
    keeps_masters: bool = True  # bf16 weights have the other 16 bits beside them
    state_bytes: float = 8.0  # of the optimizer, a trained weight
    adds_packs: bool = True  # gradients of several packs, or ranks, are added up: in fp32
    shard: int = 1

    @property
    def splits(self) -> bool:
        return self.bf16 and self.is_adamw


def weight_bytes(held: Parameters, storage: Storage) -> float:
    """Weights, their remainders among them."""
    split = FP32
    if storage.splits:
        split = BF16 + (INT16 if storage.keeps_masters else 0)
    trained = split * held.split + FP32 * held.whole
    return (trained + frozen_bytes(held, storage.bf16)) / storage.shard


def frozen_bytes(held: Parameters, bf16: bool) -> float:
    """Of a model that is not trained, or the base of an adapter."""
    return (BF16 if bf16 else FP32) * held.frozen_half + FP32 * held.frozen_whole


def gradient_bytes(held: Parameters, storage: Storage) -> float:
    """Gradients at the end of a backward pass."""
    is_half = storage.splits and not storage.adds_packs
    return ((BF16 if is_half else FP32) * held.split + FP32 * held.whole) / storage.shard


def state_bytes(held: Parameters, storage: Storage) -> float:
    """What the optimizer remembers, without remainders."""
    return storage.state_bytes * held.trained / storage.shard


def bytes_of_optimizer(name: str, arguments: dict[str, object]) -> float:
    """A weight's state of an optimizer that is no AdamW in full precision."""
    return STATE_BYTES[name] + sum(
        STATE_OF_ARGUMENT[key]
        for key, value in arguments.items()
        if value and key in STATE_OF_ARGUMENT
    )


def soft_reference_bytes(held: Parameters, shard: int = 1, rank_growth: float = 1.0) -> float:
    """Of an average of what is trained: 4 a weight, as bf16 with a remainder or as fp32. The
    factors of an adapter have `rank_growth` times the policy's rank."""
    own = held.trained - held.low_rank
    return FP32 * (own + rank_growth * held.low_rank) / shard


def visit_bytes(held: Parameters, storage: Storage) -> float:
    """Of a reference from the host's memory while it scores: what a forward pass reads."""
    half = BF16 if storage.splits else FP32
    return (half * held.split + FP32 * held.whole) / storage.shard


def model_bytes(held: Parameters, bf16: bool, is_trained: bool = False) -> float:
    """Another model beside the policy, whole on every rank: fp32 where it is read to be averaged,
    else with bf16 matrices."""
    half = BF16 if bf16 and not is_trained else FP32
    return half * (held.split + held.frozen_half) + FP32 * (held.whole + held.frozen_whole)


def cast_bytes(sizes: ModelSizes, storage: Storage, recomputes: bool) -> float:
    """bf16 copies of fp32 weights that autocast makes for products; each is kept for the backward,
    or made again with its layer."""
    if not storage.bf16 or storage.splits:
        return 0.0
    whole = sizes.largest_layer.split if recomputes else sizes.parameters.split
    return BF16 * whole / storage.shard
