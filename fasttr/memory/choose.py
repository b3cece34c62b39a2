"""What a run does with the memory of its device, where its configuration does not say.

In this order: nothing rests on the host, exact moments, cheap operations alone made again, packs of
16k tokens; then a soft reference on the host; then bf16 moments; then packs down to 8k; then
products made again, more and more; then 8-bit moments; then packs as small as the longest row, or
the longest completion with its prompt where rows are cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fasttr.memory.activations import Recompute
from fasttr.memory.plan import Bytes, Choices, Setup, bytes_of
from fasttr.memory.states import MOMENT_BYTES

WANTED_TOKENS = 16384  # of a pack: from there on products run at their full rate
FEWER_TOKENS = 8192
MOST_TOKENS = 65536
STEP = 128  # tokens that packs are counted in
BUDGETS = (1.0, 0.8, 0.4, 0.2, 0.0)  # of activations
WORTHWHILE = 0.02  # of a device: moments that take less, as an adapter's, stay exact
USABLE = 0.95  # of a device: the rest is its context, buffers of libraries, and holes


class Wishes(NamedTuple):
    """What a configuration says; None leaves it to the plan."""

    moments: str | None = None
    gradient_checkpointing: bool | None = None
    budget: float | None = None  # activation_memory_budget
    tokens: int | None = None  # max_tokens_per_batch
    rests_on_host: bool | None = None  # a soft reference
    offloads: bool = False  # the inputs of layers that are made again
    longest: int = 1  # tokens that no pack has less of: the longest row, or completion
    step_tokens: int = MOST_TOKENS  # that no step has more of


class Plan(NamedTuple):
    """A choice, what it holds, and whether that fits."""

    setup: Setup
    choices: Choices
    bytes: Bytes
    room: float | None  # bytes that may be planned with; None: nobody knows

    @property
    def fits(self) -> bool:
        return self.room is None or self.bytes.peak <= self.room


class _Stage(NamedTuple):
    """A step of the order."""

    moments: str
    budget: float
    tokens: int  # that a pack has at least
    rests_on_host: bool


def choose(setup: Setup, wishes: Wishes, room: float) -> Plan:
    """The first choice of the order that fits into `room` bytes; the last one, which does not fit,
    where none does."""
    last = None
    exact = MOMENT_BYTES["fp32"] * setup.sizes.parameters.trained / setup.shard
    for stage in _stages(setup, wishes):
        if exact < WORTHWHILE * room:
            stage = stage._replace(moments="fp32")
        last = _largest(setup, wishes, stage, room)
        if last.fits:
            return last
    assert last is not None
    return last


def planned(setup: Setup, choices: Choices, room: float | None) -> Plan:
    return Plan(setup, choices, bytes_of(setup, choices), room)


def _stages(setup: Setup, wishes: Wishes) -> Iterator[_Stage]:
    wanted, fewer = (_at_least_longest(n, wishes) for n in (WANTED_TOKENS, FEWER_TOKENS))
    reference = setup.reference
    may_rest = reference.is_soft and not reference.follows
    for budget in (1.0, 0.8):
        yield _Stage("fp32", budget, wanted, False)
    if may_rest:
        yield _Stage("fp32", 0.8, wanted, True)
    for tokens in (wanted, fewer):
        yield _Stage("bf16", 0.8, tokens, may_rest)
    for moments in ("bf16", "int8"):
        for budget in BUDGETS[1:]:
            yield _Stage(moments, budget, fewer, may_rest)
    yield _Stage("int8", 0.0, _whole(max(wishes.longest, 1)), may_rest)


def _at_least_longest(tokens: int, wishes: Wishes) -> int:
    return _whole(max(min(tokens, wishes.step_tokens), wishes.longest))


def _largest(setup: Setup, wishes: Wishes, stage: _Stage, room: float) -> Plan:
    """The largest packs of a stage that fit; where none of its least size does, that one."""
    recompute = _recompute(setup, wishes, stage.budget)
    moments = wishes.moments or stage.moments
    rests = stage.rests_on_host if wishes.rests_on_host is None else wishes.rests_on_host

    def of(tokens: int) -> Plan:
        adds = setup.world > 1 or tokens < wishes.step_tokens
        return planned(setup, Choices(moments, recompute, tokens, rests, adds), room)

    if wishes.tokens is not None:
        return of(max(wishes.tokens, wishes.longest))
    most = max(_whole(min(wishes.step_tokens, MOST_TOKENS)), stage.tokens)
    whole_step = of(most)
    if whole_step.fits:
        return whole_step
    low, high = stage.tokens // STEP, most // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if of(middle * STEP).fits:
            low = middle
        else:
            high = middle - 1
    return of(low * STEP)


def _recompute(setup: Setup, wishes: Wishes, budget: float) -> Recompute:
    """Layers that are not compiled have no budget: all is kept, or they are made again whole."""
    checkpoints = wishes.gradient_checkpointing
    if wishes.budget is not None:
        budget = wishes.budget
    elif checkpoints is False:
        budget = 1.0
    if not setup.compiled:
        checkpoints = budget < 1 if checkpoints is None else checkpoints
        budget = 1.0
    budget = 1.0 if checkpoints else budget
    return Recompute(setup.compiled, bool(checkpoints), budget, wishes.offloads)


def _whole(tokens: int) -> int:
    return -(-tokens // STEP) * STEP
