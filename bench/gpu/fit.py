"""Full fine-tuning with a moving reference of models that fill a card: peak memory and MFU."""

from __future__ import annotations

import contextlib
import json
from typing import Any, NamedTuple

import torch

from bench.gpu.notes import Task
from bench.lengths import make_trees
from bench.shapes import SHAPES, build
from fasttr import Callback, TrainConfig, train
from fasttr.data.in_memory import ListTrees
from fasttr.memory.choose import USABLE
from fasttr.models.scratch_tokenizer import byte_tokenizer


class Card(NamedTuple):
    """A model, how its moments are held, and the memory that all of it must fit into."""

    shape: str
    moments: str
    memory: float | None = None  # bytes; None: all that there is

    def __str__(self) -> str:
        where = "" if self.memory is None else f" on {self.memory / 1e9:.0f} GB"
        return f"{self.shape}, {self.moments} moments{where}"


# bf16 weights with 16 more bits, fp32 gradients: 12 bytes a parameter with bf16 moments, 16 with
# fp32 ones.
WHOLE_CARD = (Card("llama-3-8b", "bf16"), Card("llama-3-8b", "fp32"))
SMALL_CARDS = (
    Card("llama-3.2-1b", "bf16", 24e9),
    Card("llama-3.2-1b", "fp32", 48e9),
    Card("pythia-2.8b", "bf16", 48e9),
)
STEPS = 4
MOVES_EVERY = 2  # steps


class _Enough(BaseException):
    """All that was to be measured is written down."""


class _StopAfter(Callback):
    """Ends a run in the step after `steps`, without the model on disk that its end would write."""

    def __init__(self, steps: int):
        self.steps = steps
        self.planned: float | None = None  # bytes of the memory plan

    def on_step(self, run: Any, metrics: Any) -> None:
        self.planned = None if run.memory is None else run.memory.bytes.peak
        if run.step > self.steps:
            raise _Enough


def run_8b(task: Task) -> None:
    _fit_all(task, (Card("tiny", "bf16"),) if task.dry else WHOLE_CARD)


def run_small_cards(task: Task) -> None:
    _fit_all(task, (Card("tiny-neox", "bf16", 24e9),) if task.dry else SMALL_CARDS)


def _fit_all(task: Task, cards: tuple[Card, ...]) -> None:
    for card in cards:
        try:
            _fit(task, card)
        except torch.cuda.OutOfMemoryError as error:
            task.notes.check(f"{card}: fits", False, str(error)[:200])
        else:
            task.notes.check(f"{card}: fits", True)
        finally:
            if task.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)


def _fit(task: Task, card: Card) -> None:
    """A few steps, the reference moving at each second one."""
    shape = SHAPES[card.shape]
    pairs = 4 if task.dry else 64
    trees = make_trees("tiny" if task.dry else "hh", pairs * (STEPS + 1), shape.vocabulary)
    if task.device.type == "cuda":
        total = torch.cuda.get_device_properties(task.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card.memory or total) / total))
        torch.cuda.reset_peak_memory_stats(task.device)
    folder = task.out / f"run-{card.shape}-{card.moments}"
    config = TrainConfig(
        output_dir=str(folder),
        overwrite_output_dir=True,
        train_batch_size=pairs,
        max_steps=STEPS + 1,
        adam_moments=card.moments,
        memory_budget_gib=None if card.memory is None else USABLE * card.memory / 2**30,
        ref_update="hard",
        ref_update_every=MOVES_EVERY,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=task.dry,
    )
    stop = _StopAfter(STEPS)
    with contextlib.suppress(_Enough):
        train(
            config,
            model=build(shape, task.device),
            tokenizer=byte_tokenizer(),
            train_dataset=ListTrees(trees),
            callbacks=[stop],
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "grad_norm" in line][1:]
    for key, what, unit in (
        ("memory/peak_gib", "peak", "GiB"),
        ("perf/pairs_per_second", "pairs/s", "pairs/s"),
        ("perf/mfu", "MFU", ""),
    ):
        values = sorted(line[key] for line in measured if key in line)
        if values:
            of_steps = values[-1] if what == "peak" else values[len(values) // 2]
            task.notes.figure(f"{card}, {what}", of_steps, unit)
            if what == "peak" and stop.planned is not None:
                ratio = of_steps * 2**30 / stop.planned
                task.notes.figure(f"{card}, peak over planned", ratio)
