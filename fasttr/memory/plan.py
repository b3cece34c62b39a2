"""The most that a run holds at once, by what holds it.

A step goes through phases, and so does a run; each holds what lies still (weights, moments, a
resting reference) and something of its own. The peak is that of the largest phase.

Legend: T tokens of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fasttr.distributed.ranks import BUCKET
from fasttr.memory import activations, states
from fasttr.memory.activations import Recompute
from fasttr.memory.sizes import ModelSizes, Parameters
from fasttr.memory.states import BF16, FP32, Storage

GIB = 2**30


class Reference(NamedTuple):
    """Where log-probs of a reference come from, and what else is beside the policy."""

    is_soft: bool = False  # weights of its own: an average
    follows: bool = False  # it moves after every step, in the optimizer's sweep: beside the policy
    has_initial: bool = False  # another model scores the first window
    is_resident: bool = False  # a frozen copy in fp32 beside the policy, in on-policy training
    has_critic: bool = False  # a model of the policy's size with an optimizer of its own
    rank_growth: float = 1.0  # of an adapter's average, over the policy's rank


NO_REFERENCE = Reference()


class Setup(NamedTuple):
    """A run as far as memory knows it; what may be chosen is in `Choices`."""

    sizes: ModelSizes
    bf16: bool
    chunk_rows: int  # of the head, at once
    is_adamw: bool = True
    keeps_masters: bool = True
    state_bytes: float | None = None  # a weight, of an optimizer that is no AdamW
    compiled: bool = False
    reference: Reference = NO_REFERENCE
    world: int = 1
    shard: int = 1  # ranks among which everything that lies still is divided
    widest: int = 1  # tokens of the longest pack, whose parts meet at the head where it is cut


class Choices(NamedTuple):
    """What a plan may choose where a configuration does not say it."""

    moments: str  # fp32, bf16 or int8; of AdamW
    recompute: Recompute
    tokens: int  # T
    rests_on_host: bool  # a soft reference, between windows
    adds_packs: bool = True  # a step may have several packs

    def storage(self, setup: Setup) -> Storage:
        of_adamw = states.MOMENT_BYTES[self.moments]
        return Storage(
            bf16=setup.bf16,
            is_adamw=setup.is_adamw,
            keeps_masters=setup.keeps_masters,
            state_bytes=of_adamw if setup.state_bytes is None else setup.state_bytes,
            adds_packs=self.adds_packs or setup.world > 1,
            shard=setup.shard,
        )


class Bytes(NamedTuple):
    """Bytes of one rank, by what they are."""

    still: Mapping[str, float]  # from the first step to the last
    gradients: float
    activations: float  # kept by a pack's forward
    phases: Mapping[str, float]  # everything that is held at once, in each phase
    on_host: float  # a reference that rests there, pinned
    offloaded: float = 0.0  # inputs of layers on the host, pinned

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def bytes_of(setup: Setup, choices: Choices) -> Bytes:
    """What a run with those choices holds."""
    sizes, recompute, tokens = setup.sizes, choices.recompute, choices.tokens
    held, storage = sizes.parameters, choices.storage(setup)
    recomputes = recompute.whole_layers
    soft = on_host = 0.0
    if setup.reference.is_soft:
        soft = states.soft_reference_bytes(held, setup.shard, setup.reference.rank_growth)
    if choices.rests_on_host:
        soft, on_host = 0.0, soft
    resident = states.model_bytes(held, setup.bf16, is_trained=True)
    still = {
        "weights": states.weight_bytes(held, storage),
        "moments": states.state_bytes(held, storage),
        "reference": soft + (resident if setup.reference.is_resident else 0.0),
        "critic": _critic(held) if setup.reference.has_critic else 0.0,
    }
    lying = sum(still.values())
    of_head = _head_gradient(sizes, storage)
    gradients = states.gradient_bytes(held, storage)
    if storage.splits and not storage.adds_packs and not sizes.is_tied:
        gradients += of_head / 2  # in fp32, where all others are bf16
    kept = tokens * activations.kept_bytes(sizes, recompute)
    kept += states.cast_bytes(sizes, storage, recomputes)
    head = activations.head_bytes(
        sizes, min(setup.chunk_rows, tokens), setup.bf16, splits=storage.splits
    )
    at_head = head.logits + head.weight
    at_head += max(tokens, setup.widest) * activations.head_working_bytes(sizes, setup.bf16)
    at_layer = tokens * activations.layer_working_bytes(sizes, recompute)
    at_layer += _gradients_of_a_layer(sizes, storage)
    at_end = activations.embedding_gradient_bytes(sizes, adds_packs=storage.adds_packs)
    # Of one pack a step, gradients come while activations go: the head's is made first.
    before = gradients if storage.adds_packs else of_head
    gathered = _gathered_bytes(sizes, storage)
    messages = FP32 * BUCKET if setup.world > setup.shard else 0.0
    phases = {
        "head": lying + before + kept + at_head + gathered,
        "layers": lying + before + kept + at_layer + gathered,
        "embedding": lying + gradients + max(at_end, at_layer) + gathered,
        "update": lying + gradients + messages,
        "scoring": lying + _visitor(setup, choices, storage) + at_head + at_layer / 2 + gathered,
        "loading": _while_loading(setup, storage, still),
    }
    offloaded = tokens * activations.offloaded_bytes(sizes, recompute)
    return Bytes(still, gradients, kept, phases, on_host, offloaded)


def _head_gradient(sizes: ModelSizes, storage: Storage) -> float:
    """Of the head's weight, where it is trained: in fp32, whatever the weight is."""
    return FP32 * sizes.head_weights / storage.shard if sizes.outside.trained else 0.0


def _critic(held: Parameters) -> float:
    """Weights, gradients and both moments in fp32."""
    return (3 * FP32 + FP32) * float(held.all)


def _gradients_of_a_layer(sizes: ModelSizes, storage: Storage) -> float:
    """bf16, until they are added to those of earlier packs; sharded ones are summed in fp32."""
    if storage.shard > 1:
        return (BF16 + FP32) * sizes.largest_layer.split
    return BF16 * sizes.largest_layer.split if storage.splits and storage.adds_packs else 0.0


def _gathered_bytes(sizes: ModelSizes, storage: Storage) -> float:
    """Whole weights that sharded ranks have of each other: two layers, and the larger of the
    embedding and the head with its gradient in fp32."""
    if storage.shard == 1:
        return 0.0
    layer = sizes.largest_layer
    half = BF16 if storage.bf16 else FP32
    layers = 2 * (
        half * (layer.split + layer.frozen_half) + FP32 * (layer.whole + layer.frozen_whole)
    )
    trains_head = sizes.outside.trained > 0
    return layers + (half + (FP32 if trains_head else 0)) * sizes.head_weights


def _visitor(setup: Setup, choices: Choices, storage: Storage) -> float:
    """Weights that are there for scoring alone."""
    held = setup.sizes.parameters
    visits = states.visit_bytes(held, storage) if choices.rests_on_host else 0.0
    is_initial = setup.reference.has_initial and not setup.reference.is_soft
    return visits + (states.model_bytes(held, setup.bf16) if is_initial else 0.0)


def _while_loading(setup: Setup, storage: Storage, still: Mapping[str, float]) -> float:
    """Weights come in fp32; what an average begins with is another model in fp32."""
    held = setup.sizes.parameters
    whole = states.model_bytes(held, setup.bf16, is_trained=True) / storage.shard
    if not (setup.reference.is_soft and setup.reference.has_initial):
        return max(whole, sum(still.values()))
    averaged = states.soft_reference_bytes(held, storage.shard)
    return still["weights"] + still["moments"] + whole + averaged
