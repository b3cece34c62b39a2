"""The numbers of a report: what a run came to, and by how much two runs differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fasttr.console import duration, shortened
from fasttr.metrics.plots import series
from fasttr.metrics.results import Estimate, Results, estimate, paired_difference
from fasttr.metrics.ties import without_ties
from fasttr.report.record import Record


class Shown(NamedTuple):
    """A metric of the last evaluation, as a person reads it."""

    key: str
    label: str
    format: str


HEADLINES = (
    Shown("eval_anchor/rewards/accuracies", "held-out accuracy against the initial policy", ".3f"),
    Shown("eval_anchor/rewards/margins", "held-out margin against the initial policy", "+.3f"),
    Shown("eval_accuracy", "held-out accuracy", ".3f"),
    Shown("eval_gold_reward", "gold reward of samples", "+.3f"),
    Shown("eval_kl_to_initial", "KL to the initial policy, nats", ".2f"),
    Shown("eval_loss", "held-out loss", ".4f"),
    Shown("reward", "reward of the last rollouts", "+.3f"),
)


def headline(record: Record) -> Iterator[tuple[str, str]]:
    """(number, what it is): the last evaluation's, then steps, time, speed and memory."""
    shown = Record(**{**vars(record), "lines": [without_ties(line) for line in record.lines]})
    for one in HEADLINES:
        value = shown.last(one.key)
        if value is None:
            continue
        stderr = shown.last(f"{one.key}_stderr")
        error = f" ± {1.96 * stderr:{one.format.lstrip('+')}}" if stderr else ""
        yield f"{value:{one.format}}{error}", one.label
    step, total = shown.last("step"), record.facts.get("total_steps")
    if step is not None:
        yield f"{step:,}" + (f" of {total:,}" if total else ""), "optimizer steps"
    yield from cost(record)


def cost(record: Record) -> Iterator[tuple[str, str]]:
    """Time, speed and memory."""
    runtime = record.last("train_runtime")
    if runtime is not None:
        yield duration(runtime), "since its last start, all included"
    speeds = series(record.lines, "perf/tokens_per_second")[1]
    if any(speeds):
        yield shortened(statistics.median(speeds)), "tokens a second of training steps, median"
    memory = record.last("memory/peak_gib")
    if memory is not None:
        yield f"{memory:.1f} GiB", "peak memory"
    updates = record.last("ref/updates")
    if updates:
        yield f"{updates:,}", "updates of the reference"


def with_interval(value: Estimate, form: str = "+.3g") -> str:
    """`+0.0123 (-0.0040 to +0.0286)`: a mean and its 95 % interval."""
    if math.isnan(value.stderr):
        return f"{value.mean:{form}}"
    return f"{value.mean:{form}} ({value.low:{form}} to {value.high:{form}})"


def common_results(records: Sequence[Record]) -> list[str]:
    """Names of what all runs were measured by, on the same rows."""
    first, *others = records
    return [
        name
        for name, of_first in first.results.items()
        if all(
            name in other.results and _same_rows(of_first, other.results[name]) for other in others
        )
    ]


def differences(
    records: Sequence[Record], name: str
) -> list[tuple[str, Estimate, Estimate | None]]:
    """(run, its own mean, its paired difference to the first run)."""
    first = records[0].results[name]
    found = []
    for record in records:
        own = record.results[name]
        pairs = None if record is records[0] else paired_difference(own, first)
        found.append((record.name, estimate(own.values), pairs))
    return found


def verdict(difference: Estimate) -> str:
    if math.isnan(difference.stderr):
        return ""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "no difference shown"


def _same_rows(a: Results, b: Results) -> bool:
    return a.rows == b.rows and len(a.values) == len(b.values)
