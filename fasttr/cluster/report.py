"""What `fasttr plan` prints: modes of a run over cards, each with its memory and its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttr.cluster.modes import Estimate, Mode, estimate, modes
from fasttr.cluster.rates import CARDS, Machine, measured
from fasttr.cluster.settings import PlanSettings
from fasttr.cluster.step import Work
from fasttr.errors import FasttrError, did_you_mean, first_line
from fasttr.memory.activations import Recompute
from fasttr.memory.choose import USABLE, Wishes, choose
from fasttr.memory.plan import GIB, Reference, Setup
from fasttr.memory.shapes import SHAPES
from fasttr.memory.sizes import ModelSizes, sizes_of
from fasttr.models.lora import AdapterConfig
from fasttr.models.packed import head_rows

COLUMNS = (
    "mode",
    "GiB a card",
    "moments",
    "tokens a pack",
    "kept",
    "host GiB",
    "step, s",
    "of it waiting",
    "GB sent",
    "tokens/s a card",
    "MFU",
)


def report(settings: PlanSettings) -> str:
    """The text of `fasttr plan`. FasttrError for a model that is not known."""
    machine = Machine.of(settings.card)
    if settings.results is not None:
        machine = measured(machine, settings.results)
    if settings.gpus > settings.gpus_per_node and settings.gpus % settings.gpus_per_node:
        raise FasttrError(
            f"gpus: got {settings.gpus} with {settings.gpus_per_node} a machine; wanted whole "
            "machines"
        )
    config = config_of(settings.model)
    found, absent = [], []
    for mode in modes(settings.gpus, settings.gpus_per_node):
        try:
            found.append(_estimate(settings, config, mode, machine))
        except FasttrError as error:
            absent.append(f"{mode.name}: {first_line(error)}")
    if not found:
        raise FasttrError(absent[0])
    held = found[0].memory.setup.sizes.parameters.all
    work = _work(settings)
    lines = [
        f"{settings.model}, {held / 1e9:.2f} billion parameters, on {settings.gpus} x "
        f"{settings.card}, {min(settings.gpus, settings.gpus_per_node)} a machine",
        f"A model, not a measurement: {machine.products / 1e12:.0f} TFLOP/s of products, "
        f"{machine.memory / 1e12:.2f} TB/s of memory ({machine.source}), "
        f"{machine.link / 1e9:.0f} GB/s inside a machine, {machine.network / 1e9:.0f} GB/s a card "
        "between them.",
        f"Steps of {settings.train_batch_size} pairs, {work.tokens:,.0f} packed tokens, reference "
        f"{settings.ref_update}; a step with the scoring of its rows.",
        "",
    ]
    lines += aligned([COLUMNS, *(_row(one) for one in found)])
    lines += absent
    return "\n".join(lines)


def config_of(name: str) -> Any:
    """The transformers config of a folder, a config.json, or a published shape."""
    if name in SHAPES:
        return SHAPES[name].config()
    if not Path(name).exists():
        raise FasttrError(
            f"model: got {name!r}; wanted a folder, a config.json or one of {', '.join(SHAPES)}"
            f"{did_you_mean(name, SHAPES)}"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise FasttrError(f"model: cannot read {name}: {first_line(error)}") from error


def setup_of(settings: PlanSettings, sizes: ModelSizes, mode: Mode) -> Setup:
    """A run of these settings on the cards of a mode, in bf16."""
    growth = 6.0 if mode.is_adapter else 1.0
    return Setup(
        sizes=sizes,
        bf16=True,
        chunk_rows=head_rows(sizes.vocabulary, CARDS[settings.card].memory),
        keeps_masters=settings.dtype == "float32",
        compiled=True,
        reference=Reference(is_soft=settings.ref_update == "soft", rank_growth=growth),
        world=mode.cards,
        shard=mode.shard,
    )


def _estimate(settings: PlanSettings, config: Any, mode: Mode, machine: Machine) -> Estimate:
    adapter = AdapterConfig(r=settings.lora_r) if mode.is_adapter else None
    sizes = sizes_of(config, bf16=True, adapter=adapter)
    room = USABLE * machine.memory_bytes
    if settings.memory_gib is not None:
        room = settings.memory_gib * GIB
    longest = 2 * settings.max_length  # both sides of a pair, and no prompt to share
    rows_of_rank = -(-settings.train_batch_size // mode.cards)
    wishes = Wishes(
        moments=settings.adam_moments, longest=longest, step_tokens=rows_of_rank * longest
    )
    memory = choose(setup_of(settings, sizes, mode), wishes, room)
    return estimate(mode, memory, _work(settings), machine, gpus_per_node=settings.gpus_per_node)


def _work(settings: PlanSettings) -> Work:
    return Work.of_pairs(
        settings.train_batch_size, settings.prompt_tokens, settings.completion_tokens
    )


def _row(found: Estimate) -> tuple[str, ...]:
    memory, choices = found.memory, found.memory.choices
    peak = f"{memory.bytes.peak / GIB:.1f}"
    if not memory.fits:
        assert memory.room is not None
        missing = f"{peak}: does not fit {memory.room / GIB:.1f}"
        return (found.mode.name, missing, *[""] * (len(COLUMNS) - 2))
    return (
        found.mode.name,
        peak,
        choices.moments,
        f"{choices.tokens:,}",
        _kept(choices.recompute),
        f"{memory.bytes.on_host / GIB:.1f}",
        f"{found.seconds:.3g}",
        f"{found.waiting / found.seconds:.0%}",
        f"{found.traffic.total / 1e9:.3g}",
        f"{found.tokens_per_second:,.0f}",
        f"{found.mfu:.0%}",
    )


def _kept(recompute: Recompute) -> str:
    """Of the activations of a layer."""
    return "inputs" if recompute.whole_layers else f"{recompute.budget:g}"


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as lines of a table for a terminal."""
    widths = [max(len(row[i]) for row in rows if i == 0 or row[-1]) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
