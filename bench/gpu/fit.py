"""Full fine-tuning with a moving reference of models that fill a card: peak memory and MFU."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch

from bench.gpu.notes import Task
from bench.lengths import make_trees
from bench.shapes import SHAPES, build
from fasttr import TrainConfig, train
from fasttr.data.in_memory import ListTrees
from fasttr.models.scratch_tokenizer import byte_tokenizer


class Card(NamedTuple):
    """A model, and the memory that it must fit into."""

    shape: str
    memory: float | None  # bytes; None: all that there is


SMALL_CARDS = (
    Card("llama-3.2-1b", 24e9),
    Card("pythia-2.8b", 24e9),
    Card("llama-3.2-1b", 48e9),
    Card("pythia-2.8b", 48e9),
)


def run_8b(task: Task) -> None:
    _fit(task, Card("tiny" if task.dry else "llama-3-8b", None), steps=6)


def run_small_cards(task: Task) -> None:
    for card in (Card("tiny", 24e9),) if task.dry else SMALL_CARDS:
        try:
            _fit(task, card, steps=4)
        except torch.cuda.OutOfMemoryError as error:
            task.notes.check(f"{_name(card)} fits", False, str(error)[:200])
        finally:
            if task.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)


def _fit(task: Task, card: Card, steps: int) -> None:
    """A few steps, the reference moving at each second one."""
    shape = SHAPES[card.shape]
    pairs = 4 if task.dry else 64
    trees = make_trees("tiny" if task.dry else "hh", pairs * steps, shape.vocabulary)
    if task.device.type == "cuda":
        total = torch.cuda.get_device_properties(task.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card.memory or total) / total))
        torch.cuda.reset_peak_memory_stats(task.device)
    folder = task.out / f"run-{card.shape}"
    config = TrainConfig(
        output_dir=str(folder),
        overwrite_output_dir=True,
        train_batch_size=pairs,
        max_steps=steps,
        ref_update="hard",
        ref_update_every=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=task.dry,
    )
    train(
        config,
        model=build(shape, task.device),
        tokenizer=byte_tokenizer(),
        train_dataset=ListTrees(trees),
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "grad_norm" in line][1:]
    prefix = "" if card.memory is None else f"{_name(card)}, "
    task.notes.check(f"{_name(card)} fits", True)
    task.notes.figure(f"{prefix}peak", max(x["memory/peak_gib"] for x in measured), "GiB")
    rates = [line["perf/pairs_per_second"] for line in measured]
    task.notes.figure(f"{prefix}pairs/s", sorted(rates)[len(rates) // 2], "pairs/s")
    shares = [line["perf/mfu"] for line in measured if "perf/mfu" in line]
    if shares:
        task.notes.figure(f"{prefix}MFU", sorted(shares)[len(shares) // 2])


def _name(card: Card) -> str:
    where = "" if card.memory is None else f" on {card.memory / 1e9:.0f} GB"
    return f"{card.shape}{where}"
