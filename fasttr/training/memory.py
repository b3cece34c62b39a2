"""The memory plan of a run, made and printed before any weight is loaded.

On a GPU it chooses what the configuration leaves open; on a CPU only where it is told what to plan
with.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from fasttr.batch import TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.errors import FasttrError, first_line
from fasttr.memory.activations import Recompute
from fasttr.memory.choose import USABLE, Plan, Wishes, choose, planned
from fasttr.memory.plan import GIB, NO_REFERENCE, Choices, Reference, Setup
from fasttr.memory.sizes import ModelSizes, sizes_of
from fasttr.memory.states import bytes_of_optimizer
from fasttr.memory.table import sentence, table
from fasttr.models.packed import head_rows
from fasttr.models.small import Build
from fasttr.optim.named import OPTIMIZERS, parse_arguments
from fasttr.packing.tiers import AUTO, SHARED, longest_sequence, row_tokens
from fasttr.reference.schedule import Soft

Config = TypeVar("Config", bound=TrainConfig)


class Room(NamedTuple):
    """The memory of a device."""

    name: str
    total: float | None  # bytes; None: a CPU's is shared with everything else
    usable: float | None  # that may be planned with; None: nothing is chosen

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> Room:
        asked = None if config.memory_budget_gib is None else config.memory_budget_gib * GIB
        if device.type != "cuda":
            return cls("this machine", None, asked)
        found = torch.cuda.get_device_properties(device)
        total = float(found.total_memory)
        return cls(found.name, total, asked or USABLE * total)


class Rows(NamedTuple):
    """Lengths as far as memory asks for them."""

    longest: int = 1  # tokens of what must share a pack
    step_tokens: int | None = None  # that no step has more of; None: nobody knows
    uncut: int | None = None  # of what goes through the layers at once; None: all that `longest` is

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        splits: Sequence[TreeSource],
        group_rows: int,
        *,
        are_cut: bool = False,
    ) -> Rows:
        """Of rows to train on, and others after them; `are_cut`: a pack over the budget goes in
        parts."""
        tier = SHARED if config.attention_tier == AUTO else config.attention_tier
        sizes = [row_tokens(tier, trees) for trees in splits]
        longest = max(_sum_of_largest(found, group_rows) for found in sizes)
        step_tokens = _sum_of_largest(sizes[0], config.train_batch_size)
        uncut = max(longest_sequence(trees) for trees in splits) if are_cut else None
        return cls(longest, step_tokens, uncut)

    @property
    def least(self) -> int:
        """Tokens that no pack can have less of."""
        return self.longest if self.uncut is None else self.uncut


def plan_memory(
    config: Config,
    device: torch.device,
    hf_config: Any,
    rows: Rows,
    *,
    reference: Reference | None = None,
    ranks: Ranks = ALONE,
    build: Build | None = None,
    room: Room | None = None,
) -> tuple[Config, Plan | None]:
    """Choose, print, and give the configuration with what was chosen; FasttrError where nothing
    fits.

    `build` makes the model of the config; by default AutoModelForCausalLM. `room`: by default what
    the device has. None in place of a plan: the architecture cannot be counted, which is said.
    """
    room = room or Room.of(config, device)
    if config.activation_offloading:
        config = dataclasses.replace(config, gradient_checkpointing=True)
    compiles = config.compiles(device)
    if config.activation_memory_budget is not None and not compiles:
        raise FasttrError(
            f"activation_memory_budget: got {config.activation_memory_budget:g}, and layers are "
            f"not compiled here ({device.type}, attention_tier {config.attention_tier}); wanted "
            "compile true, or leave it out"
        )
    try:
        sizes = _sizes(config, device, hf_config, build)
    except Exception as error:  # any code of transformers or of a repository runs here
        say(f"memory: not planned, {first_line(error)}")
        return _unplanned(config, device), None
    setup = _setup(config, device, sizes, room, ranks, reference)._replace(widest=rows.longest)
    wishes = _wishes(config, rows)
    if room.usable is None:
        plan = planned(setup, _usual(config, setup, rows), None)
        say(sentence(plan))
        _compare_with_ram(plan)
    else:
        plan = choose(setup, wishes, room.usable)
        for line in table(plan, room.name, room.total):
            say(line)
        _require_fit(config, plan, wishes)
    return _with_choices(config, plan), plan


def unless_compiled(config: TrainConfig, plan: Plan | None, is_compiled: bool) -> bool:
    """Whether whole layers must be made again because those that a plan counts on as compiled are
    not."""
    if plan is None or is_compiled or not plan.choices.recompute.compiled:
        return False
    return plan.room is not None and config.compile is None


def _sizes(
    config: TrainConfig, device: torch.device, hf_config: Any, build: Build | None
) -> ModelSizes:
    tier = SHARED if config.attention_tier == AUTO else config.attention_tier
    return sizes_of(
        hf_config,
        bf16=config.computes_in_bf16(device),
        adapter=config.adapter(),
        tier=tier,
        build=build,
        build_name="" if build is None else repr(build),
    )


def _setup(
    config: TrainConfig,
    device: torch.device,
    sizes: ModelSizes,
    room: Room,
    ranks: Ranks,
    reference: Reference | None,
) -> Setup:
    memory = room.total if room.total is not None else room.usable
    own_states = None
    is_adamw = OPTIMIZERS[config.optim].is_adamw
    if not is_adamw:
        arguments = parse_arguments(config.optim, config.optim_args)
        own_states = bytes_of_optimizer(config.optim, arguments)
    return Setup(
        sizes=sizes,
        bf16=config.computes_in_bf16(device),
        chunk_rows=head_rows(sizes.vocabulary, memory),
        is_adamw=is_adamw,
        keeps_masters=config.dtype != "bfloat16",
        state_bytes=own_states,
        compiled=config.compiles(device),
        reference=_reference(config) if reference is None else reference,
        world=ranks.world,
        shard=ranks.shard_size,
    )


def _reference(config: TrainConfig) -> Reference:
    """Of a run on preferences: a fixed or hard one has no weights of its own."""
    schedule = config.schedule
    bound = config.ref_rank_bound()
    if not isinstance(schedule, Soft):
        return NO_REFERENCE._replace(has_initial=config.ref_model_name_or_path is not None)
    return Reference(
        is_soft=True,
        follows=schedule.every == 1,
        has_initial=config.ref_model_name_or_path is not None,
        rank_growth=1.0 if bound is None else bound.rank / config.lora_r,
    )


def _wishes(config: TrainConfig, rows: Rows) -> Wishes:
    wishes = Wishes(
        moments=config.adam_moments,
        gradient_checkpointing=config.gradient_checkpointing,
        budget=config.activation_memory_budget,
        tokens=config.max_tokens_per_batch,
        rests_on_host=config.ref_on_host,
        offloads=config.activation_offloading,
        longest=rows.least,
    )
    return wishes if rows.step_tokens is None else wishes._replace(step_tokens=rows.step_tokens)


def _usual(config: TrainConfig, setup: Setup, rows: Rows) -> Choices:
    """What is done where nothing is chosen."""
    tokens = config.token_budget(torch.device("cpu"))
    budget = config.activation_memory_budget
    checkpoints = config.gradient_checkpointing
    if checkpoints is None:
        checkpoints = budget is None
    return Choices(
        moments=config.adam_moments or "fp32",
        recompute=Recompute(
            setup.compiled,
            checkpoints,
            1.0 if budget is None else budget,
            offloads=config.activation_offloading,
        ),
        # A pack is no longer than its step. Packs are cut where somebody said how long they are.
        tokens=max(
            min(tokens, rows.step_tokens or tokens),
            rows.longest if config.max_tokens_per_batch is None else rows.least,
        ),
        rests_on_host=bool(config.ref_on_host),
        adds_packs=rows.step_tokens is None or tokens < rows.step_tokens,
    )


def _unplanned(config: Config, device: torch.device) -> Config:
    checkpoints = config.gradient_checkpointing
    if checkpoints is None:
        checkpoints = config.activation_memory_budget is None
    return dataclasses.replace(
        config,
        max_tokens_per_batch=config.token_budget(device),
        adam_moments=config.adam_moments or "fp32",
        gradient_checkpointing=checkpoints,
    )


def _with_choices(config: Config, plan: Plan) -> Config:
    """The configuration with what it left open."""
    choices = plan.choices
    recompute = choices.recompute
    tokens = None if plan.room is None else choices.tokens
    has_budget = recompute.compiled and not recompute.whole_layers and plan.room is not None
    has_choice = plan.room is not None and plan.setup.reference.is_soft
    return dataclasses.replace(
        config,
        ref_on_host=choices.rests_on_host if has_choice else config.ref_on_host,
        max_tokens_per_batch=config.max_tokens_per_batch or tokens,
        adam_moments=config.adam_moments or choices.moments,
        gradient_checkpointing=recompute.whole_layers,
        activation_memory_budget=recompute.budget
        if has_budget
        else config.activation_memory_budget,
    )


def _require_fit(config: TrainConfig, plan: Plan, wishes: Wishes) -> None:
    if plan.fits:
        return
    assert plan.room is not None
    raise FasttrError(
        f"memory: the run would hold {plan.bytes.peak / GIB:.1f} GiB at once, and there are "
        f"{plan.room / GIB:.1f} to plan with (the table above); wanted "
        f"{_remedy(config, plan, wishes)}; memory_budget_gib {plan.bytes.peak / GIB:.0f} goes on "
        "nevertheless"
    )


def _remedy(config: TrainConfig, plan: Plan, wishes: Wishes) -> str:
    """What would fit: settings left out, then weights without the other 16 bits."""
    assert plan.room is not None
    free = Wishes(longest=wishes.longest, step_tokens=wishes.step_tokens)
    unset = [
        name
        for name, wish in (
            ("adam_moments", wishes.moments),
            ("gradient_checkpointing", wishes.gradient_checkpointing),
            ("activation_memory_budget", wishes.budget),
            ("max_tokens_per_batch", wishes.tokens),
        )
        if wish is not None
    ]
    if unset and choose(plan.setup, free, plan.room).fits:
        return f"a run without {', '.join(unset)}"
    halved = plan.setup._replace(keeps_masters=False)
    if plan.setup.bf16 and choose(halved, free, plan.room).fits:
        return "dtype bfloat16, whose steps are rounded stochastically"
    if not config.use_peft:
        return "use_peft true, a smaller model, or a larger card"
    return "shorter rows, a smaller model, or a larger card"


def _compare_with_ram(plan: Plan) -> None:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if plan.bytes.peak > ram:
        say(f"WARNING: this machine has {ram / GIB:.1f} GiB of memory, less than is planned")


def _sum_of_largest(sizes: np.ndarray, count: int) -> int:
    if len(sizes) <= count:
        return int(sizes.sum())
    return int(np.partition(sizes, len(sizes) - count)[-count:].sum())
