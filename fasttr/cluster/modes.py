"""Ways to lay a run over cards: what each card holds and sends, and how long a step takes.

Sums of gradients are fp32, gathered weights as they are read. Traffic of shards goes on beside the
work of the same micro-step; the sum over replicas, once a step, waits for its end. A moving
reference sends nothing: every rank moves what it holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fasttr.cluster.rates import Machine
from fasttr.cluster.step import (
    COMPILED,
    EAGER,
    Model,
    Stage,
    Work,
    again,
    scoring_seconds,
    step_seconds,
    useful_operations,
)
from fasttr.memory.choose import Plan
from fasttr.memory.sizes import ModelSizes
from fasttr.memory.states import BF16, FP32


class Mode(NamedTuple):
    """How weights lie on the cards."""

    name: str
    shard: int  # cards that hold one copy together
    replicate: int  # copies
    is_adapter: bool = False

    @property
    def cards(self) -> int:
        return self.shard * self.replicate


def modes(gpus: int, gpus_per_node: int) -> list[Mode]:
    """Those that differ, for so many cards."""
    node = min(gpus, gpus_per_node)
    found = [Mode("data parallel" if gpus > 1 else "one card", 1, gpus)]
    if gpus > 1:
        found.append(Mode("full shard", gpus, 1))
    if gpus > node:
        found.append(Mode("HSDP, a node a copy", node, gpus // node))
    found.append(Mode("LoRA", 1, gpus, is_adapter=True))
    if gpus > 1:
        found.append(Mode("LoRA, base sharded", node, gpus // node, is_adapter=True))
    return found


class Traffic(NamedTuple):
    """Bytes that one card sends in a step."""

    overlapped: float  # of shards
    at_end: float  # the sum over replicas

    @property
    def total(self) -> float:
        return self.overlapped + self.at_end


class Estimate(NamedTuple):
    """A mode by the model: one step."""

    mode: Mode
    memory: Plan
    computing: float  # seconds of the step, without the reference
    scoring: float  # of the reference, a step's rows
    waiting: float  # for traffic
    traffic: Traffic
    tokens: float  # a card
    mfu: float

    @property
    def seconds(self) -> float:
        return self.computing + self.scoring + self.waiting

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def estimate(
    mode: Mode,
    memory: Plan,
    work: Work,
    machine: Machine,
    *,
    gpus_per_node: int,
    scores: bool = True,
) -> Estimate:
    """One step of `work` over the cards of a mode; `scores`: it has a reference."""
    sizes = memory.setup.sizes
    model = Model.of_sizes(sizes)
    own = work.over(mode.cards)
    stage = stage_of(memory)
    computing = step_seconds(model, own, stage, machine).total
    scoring = scoring_seconds(model, own, stage, machine) if scores else 0.0
    packs = math.ceil(own.tokens / memory.choices.tokens)
    traffic = traffic_of(sizes, mode, packs, scores)
    is_inside = mode.shard <= gpus_per_node
    shard_rate = machine.link if is_inside else machine.network
    replica_rate = machine.link if mode.cards <= gpus_per_node else machine.network
    hidden = traffic.overlapped / shard_rate
    waiting = max(0.0, hidden - computing - scoring) + traffic.at_end / replica_rate
    seconds = computing + scoring + waiting
    useful = useful_operations(model, own)
    return Estimate(
        mode=mode,
        memory=memory,
        computing=computing,
        scoring=scoring,
        waiting=waiting,
        traffic=traffic,
        tokens=own.tokens,
        mfu=useful / seconds / machine.peak,
    )


def stage_of(memory: Plan) -> Stage:
    """How a step is done with the choices of a plan."""
    setup, choices = memory.setup, memory.choices
    made = again(choices.recompute)
    held = setup.sizes.parameters
    share = held.trained / held.all / setup.shard
    state = choices.storage(setup).state_bytes
    weight = 4 if setup.keeps_masters else 2
    return Stage(
        name=str(choices.recompute),
        elementwise=COMPILED if setup.compiled else EAGER,
        products_again=made.products,
        elementwise_again=made.elementwise,
        # Weights and moments are read and written, the gradient is read for its norm and again.
        sweep=share * (2 * weight + 2 * state + 2 * FP32),
        # A bf16 gradient is read and added to one in fp32.
        each_pack=share * (BF16 + 2 * FP32),
        pack_tokens=choices.tokens,
    )


def traffic_of(sizes: ModelSizes, mode: Mode, packs: int, scores: bool) -> Traffic:
    """Bytes of one card and step, `packs` micro-steps of it."""
    held = sizes.parameters
    lying = BF16 * (held.split + held.frozen_half) + FP32 * (held.whole + held.frozen_whole)
    sums = FP32 * held.trained
    overlapped = at_end = 0.0
    if mode.shard > 1:
        others = (mode.shard - 1) / mode.shard
        # Gathered for the forward, the backward and to score; gradients are summed and scattered.
        overlapped = packs * others * (lying * (3 if scores else 2) + sums)
    if mode.replicate > 1:
        others = (mode.replicate - 1) / mode.replicate
        at_end = 2 * others * sums / mode.shard
    return Traffic(overlapped, at_end)
