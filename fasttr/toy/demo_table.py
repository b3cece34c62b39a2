"""The demo's two tables, and the sentences that they come to.

An arm is compared with DPO seed by seed, on the same prompts: the seeds' differences give the
interval (Student's t), so that it holds for another seed too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.console import counted
from fasttr.metrics.plots import read_metrics
from fasttr.toy.outcomes import Rows, at_equal_kl, at_the_end
from fasttr.toy.stats import Interval, interval

COLUMNS = 80
ABOUT = (
    "gold: reward of one sample for each held-out prompt, at the checkpoint where it is highest "
    "and at the last one; KL: to the SFT policy, nats a sample; outside: share of samples that the "
    "task's data could not hold; accuracy: of held-out pairs, against the SFT policy. The last "
    "four are of the last checkpoint; all are means over seeds."
)
ELSEWHERE = (
    "Where a moving reference did win in this repository's own runs: on the exact toy task, with "
    "pairs that differ early. The study by factors, of which this demo repeats one setting, shows "
    "no gain in gold reward at equal KL (bench/paper/README.md)."
)


class Reading(NamedTuple):
    """What the judge found of one run."""

    rows: Rows  # of the SFT policy, then of every checkpoint: gold, kl, outside, length
    completions: Sequence[str]  # at the end
    accuracy: float  # held out, against the initial policy, at the end

    @classmethod
    def of(cls, folder: Path, judged: Mapping[str, Any]) -> Reading:
        key = "eval_anchor/rewards/accuracies"
        accuracy = [line[key] for line in read_metrics(folder) if key in line][-1]
        return cls(judged["rows"], judged["completions"], accuracy)


class Arm(NamedTuple):
    """One method, with a reading for every seed."""

    name: str
    readings: list[Reading]


class Outcome(NamedTuple):
    """A number by which two runs of one seed are compared."""

    name: str
    difference: Callable[[Rows, Rows], float]


def best(rows: Rows) -> float:
    """Gold reward of the trained checkpoint where it is highest."""
    return max(row["gold"] for row in rows[1:])


GOLD = (
    Outcome("gold at equal KL", lambda mine, its: at_equal_kl("gold", mine, its)),
    Outcome("best gold", lambda mine, its: best(mine) - best(its)),
    Outcome("last gold", lambda mine, its: at_the_end("gold", mine, its)),
)
DRIFT = (
    Outcome("KL", lambda mine, its: at_the_end("kl", mine, its)),
    Outcome("outside", lambda mine, its: at_the_end("outside", mine, its)),
)


def table(arms: Sequence[Arm]) -> str:
    """A line an arm: means over seeds."""
    start = [reading.rows[0] for reading in arms[0].readings]
    lines = [
        ["run", "best gold", "last gold", "KL", "outside", "length", "accuracy"],
        ["SFT", "", *_cells(start), ""],
    ]
    for arm in arms:
        last = [reading.rows[-1] for reading in arm.readings]
        highest = np.mean([best(reading.rows) for reading in arm.readings])
        accuracy = np.mean([reading.accuracy for reading in arm.readings])
        lines.append([arm.name, f"{highest:.3f}", *_cells(last), f"{accuracy:.3f}"])
    return f"{_aligned(lines)}\n\n{_filled(ABOUT)}"


def _cells(rows: Rows) -> list[str]:
    """Means over seeds."""
    digits = {"gold": 3, "kl": 2, "outside": 3, "length": 1}
    return [f"{np.mean([row[key] for row in rows]):.{n}f}" for key, n in digits.items()]


def verdict(arms: Sequence[Arm]) -> list[str]:
    """What each moving reference differs by from the first arm, and what it comes to in words."""
    baseline, *others = arms
    found = {
        (arm.name, outcome): difference(arm, baseline, outcome)
        for arm in others
        for outcome in (*GOLD, *DRIFT)
    }
    lines = [[f"less {baseline.name}", *(arm.name for arm in others)]]
    for outcome in (*GOLD, *DRIFT):
        lines.append([outcome.name, *(_starred(found[arm.name, outcome]) for arm in others)])
    seeds = len(baseline.readings)
    intervals = (
        f"95 % intervals over {counted(seeds, 'seed')}, paired by seed and prompt, each by itself; "
        "*: it leaves zero out. At equal KL: over the upper half of the KL that both reach."
    )
    if seeds == 1:
        return [_aligned(lines), "Verdict: one seed decides nothing; raise --seeds."]
    return [_aligned(lines), _filled(intervals), _filled(_sentence(found))]


def difference(arm: Arm, baseline: Arm, outcome: Outcome) -> Interval:
    """Of an arm to another, paired by seed."""
    return interval(
        outcome.difference(mine.rows, its.rows)
        for mine, its in zip(arm.readings, baseline.readings, strict=True)
    )


def _starred(found: Interval) -> str:
    return found.text() + ("*" if found.sign else "")


Found = Mapping[tuple[str, Outcome], Interval]


def _sentence(found: Found) -> str:
    wins, losses, further = _shown(found, GOLD, 1), _shown(found, GOLD, -1), _shown(found, DRIFT, 1)
    said = {
        (True, True): f"wins over DPO in {wins} and loses in {losses}",
        (True, False): f"wins over DPO in {wins}",
        (False, True): f"loses to DPO in {losses}",
        (False, False): "is not shown to differ from DPO in gold reward",
    }[bool(wins), bool(losses)]
    sentences = [f"Verdict: on this task the moving reference {said}."]
    if further:
        sentences.append(f"After as many steps these are higher: {further}.")
    if not wins:
        sentences.append(ELSEWHERE)
    return " ".join(sentences)


def _shown(found: Found, outcomes: Sequence[Outcome], sign: int) -> str:
    """Outcomes with the arms whose intervals lie on one side of zero."""
    parts = []
    for outcome in outcomes:
        arms = [arm for (arm, of), one in found.items() if of is outcome and one.sign == sign]
        if arms:
            parts.append(f"{outcome.name} ({', '.join(arms)})")
    return ", ".join(parts)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rest = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(["| " + head + " |", "|-" + rule + "-|", *(f"| {one} |" for one in rest)])


def _filled(text: str) -> str:
    return textwrap.fill(text, COLUMNS - 1)
