"""Tables of a model of a step's time and a card's memory: counted operations and bytes over stated
rates (`fasttr.cluster`), and the trainer's own memory plan (`fasttr.memory`) on cards that are
pretended.

Nothing here was measured on a GPU. Times are worth some 12 % either way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from bench.lengths import make_trees, packed_tokens
from bench.shapes import SHAPES
from bench.text import titled
from fasttr.cluster.rates import CARDS, Machine
from fasttr.cluster.step import (
    ALL_AGAIN,
    COMPILED,
    EAGER,
    Elementwise,
    Model,
    Stage,
    Work,
    causal,
    scoring_seconds,
    step_seconds,
    useful_operations,
)
from fasttr.memory.choose import USABLE, Plan, Wishes, choose
from fasttr.memory.plan import GIB, Reference, Setup
from fasttr.memory.shapes import Shape
from fasttr.memory.sizes import sizes_of
from fasttr.models.lora import AdapterConfig
from fasttr.models.packed import head_rows

PAIRS = 64  # of a step
SAMPLE = 2048  # pairs that mean lengths are taken over
H200 = Machine.of("h200")
SLOW_H200 = H200._replace(products=620e12, memory=3.2e12, attention=150e12)


@lru_cache
def work_of(lengths: str, pairs: int = PAIRS) -> Work:
    """A step of mean pairs of a data set."""
    trees = make_trees(lengths, SAMPLE, vocabulary=8)
    tokens = predicting = attended = 0
    for tree in trees:
        prompt = len(tree.prompt_ids)
        chosen, rejected = (len(ids) for ids in tree.completions)
        tokens += packed_tokens(tree)
        predicting += chosen + rejected
        attended += causal(prompt + chosen) + causal(prompt + rejected) - causal(prompt)
    scale = pairs / SAMPLE
    return Work(pairs, *(round(x * scale) for x in (tokens, predicting, attended)))


# Adam 28, norm 4, clipping 8; weights cast twice, gradients cast and accumulated.
EAGER_FP32 = Stage(
    name="0 fp32 weights, eager, full checkpointing, packs of 8k",
    elementwise=EAGER,
    products_again=ALL_AGAIN.products,
    elementwise_again=ALL_AGAIN.elementwise,
    sweep=40,
    each_pack=30,
    pack_tokens=8192,
    casts=6,
)
SPLIT = EAGER_FP32._replace(
    name="1 split weights, one optimizer sweep", sweep=32, each_pack=10, casts=0
)
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


def mfu(shape: Shape, work: Work, stage: Stage, machine: Machine) -> float:
    model = Model.of(shape)
    seconds = step_seconds(model, work, stage, machine).total
    return useful_operations(model, work) / seconds / machine.peak


STEP_SIZES = ("llama-3-8b", "pythia-2.8b")
STEP_LENGTHS = {"hh": "HH-RLHF", "ultrafeedback": "UltraFeedback"}


def tables() -> str:
    """All tables, as the README shows them."""
    return "\n\n".join((step_table(), memory_table()))


def step_table() -> str:
    cases = [(size, lengths) for size in STEP_SIZES for lengths in STEP_LENGTHS]
    columns = ["after change"]
    for size, lengths in cases:
        tokens = work_of(lengths).tokens / 1e3
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
        "With fp32 weights 8B does not fit."
    )
    return titled(title, columns, rows)


def _step_cell(size: str, lengths: str, stage: Stage, machine: Machine) -> str:
    shape, work = SHAPES[size], work_of(lengths)
    seconds = step_seconds(Model.of(shape), work, stage, machine).total
    return f"{seconds * 1e3:,.0f}, {mfu(shape, work, stage, machine):.0%}"


def _rate(size: str, lengths: str, stage: Stage) -> float:
    model, work = Model.of(SHAPES[size]), work_of(lengths)
    step = step_seconds(model, work, stage, H200).total
    return work.rows / (step + scoring_seconds(model, work, stage, H200))


class Setting(NamedTuple):
    """A way to hold weights, and the rows of a step."""

    name: str
    keeps_masters: bool = True
    splits: bool = True
    rows: int = PAIRS
    is_adapter: bool = False


LONGEST = 2048  # tokens of a pair: two sides of max_length 1024 without a shared prompt
SETTINGS = (
    Setting("fp32 weights, AdamW of another name", splits=False),
    Setting("16 more bits of every weight (the default)"),
    Setting("the same, 8 pairs a step: one pack", rows=8),
    Setting("dtype bfloat16: rounded stochastically", keeps_masters=False),
    Setting("LoRA, rank 16", is_adapter=True),
)
SMALL_CARDS = {"48 GB": 48e9, "24 GB": 24e9}
MEMORY_CASES = (
    ("llama-3-8b", "h200"),
    ("llama-3-8b", "h100"),
    ("pythia-2.8b", "48 GB"),
    ("llama-3.2-1b", "24 GB"),
)


def memory_table() -> str:
    """What the memory plan chooses on cards."""
    columns = ["weights and steps"]
    columns += [f"{size} on {_named(card)}" for size, card in MEMORY_CASES]
    rows = [
        [setting.name, *(_plan_cell(plan_of(setting, size, card)) for size, card in MEMORY_CASES)]
        for setting in SETTINGS
    ]
    title = (
        "Model, not a measurement: what the memory plan chooses for full fine-tuning (and LoRA) "
        f"with a soft reference, compiled layers, steps of {PAIRS} pairs of at most {LONGEST} "
        f"tokens, {USABLE:.0%} of a card: moments, share of activations kept, tokens a pack, GiB "
        "at once."
    )
    return titled(title, columns, rows)


def _named(card: str) -> str:
    return f"{card}, {_memory(card) / 1e9:.0f} GB" if card in CARDS else card


def _memory(card: str) -> float:
    return CARDS[card].memory if card in CARDS else SMALL_CARDS[card]


def plan_of(setting: Setting, size: str, card: str, reference: Reference | None = None) -> Plan:
    """The memory plan of one cell."""
    adapter = AdapterConfig() if setting.is_adapter else None
    sizes = sizes_of(SHAPES[size].config(), bf16=True, adapter=adapter)
    memory = _memory(card)
    growth = 6.0 if setting.is_adapter else 1.0
    setup = Setup(
        sizes=sizes,
        bf16=True,
        chunk_rows=head_rows(sizes.vocabulary, memory),
        is_adamw=setting.splits,
        keeps_masters=setting.keeps_masters,
        state_bytes=None if setting.splits else 8.0,
        compiled=True,
        reference=reference or Reference(is_soft=True, rank_growth=growth),
    )
    wishes = Wishes(longest=LONGEST, step_tokens=setting.rows * LONGEST)
    return choose(setup, wishes, USABLE * memory)


def _plan_cell(plan: Plan) -> str:
    peak = f"{plan.bytes.peak / GIB:.0f} GiB"
    assert plan.room is not None
    if not plan.fits:
        return f"no: at least {peak} of {plan.room / GIB:.0f}"
    choices = plan.choices
    moments = "own" if plan.setup.state_bytes is not None else choices.moments
    where = ", reference on the host" if choices.rests_on_host else ""
    return f"{moments}, {choices.recompute.budget:g}, {choices.tokens / 1e3:.1f}k, {peak}{where}"
