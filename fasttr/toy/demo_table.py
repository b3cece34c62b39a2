"""The demo's table, and the sentences that it comes to.

An arm is compared with DPO seed by seed, on the same prompts: the seeds' differences give the
interval (Student's t), so that it holds for another seed too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.metrics.plots import read_metrics
from fasttr.toy.judge import Judged

# Student's t at 97.5 %, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BASELINE = "DPO"
ELSEWHERE = (
    "Where a moving reference did win in this repository's own runs: on the exact toy task, with "
    "pairs that differ early; its study by factors shows no gain in gold reward at equal KL "
    "(bench/paper/README.md)."
)


class Reading(NamedTuple):
    """What the judge found of one run."""

    golds: Mapping[int, list[float]]  # step -> a gold reward a prompt; step 0 is the initial policy
    kl: Mapping[int, float]  # step -> nats a sample
    length: float  # of samples at the end
    completions: Sequence[str]  # at the end
    accuracy: float  # held out, against the initial policy, at the end
    updates: int

    @classmethod
    def of(cls, folder: Path, judged: Mapping[str, Any]) -> Reading:
        lines = read_metrics(folder)
        key = "eval_anchor/rewards/accuracies"
        return cls(
            golds={int(step): values for step, values in judged["golds"].items()},
            kl={int(step): value for step, value in judged["kl"].items()},
            length=judged["length"],
            completions=judged["completions"],
            accuracy=[line[key] for line in lines if key in line][-1],
            updates=max((line.get("ref/updates", 0) for line in lines), default=0),
        )

    @property
    def last(self) -> int:
        return max(self.golds)

    @property
    def peak(self) -> int:
        """The trained checkpoint with the highest gold reward."""
        return max(
            (step for step in self.golds if step > 0), key=lambda step: np.mean(self.golds[step])
        )


class Arm(NamedTuple):
    """One method, with a reading for every seed."""

    name: str
    readings: list[Reading]

    def over_seeds(self, value: Callable[[Reading], float]) -> str:
        found = [value(reading) for reading in self.readings]
        if len(found) == 1:
            return f"{found[0]:+.3f}"
        return f"{np.mean(found):+.3f} +- {np.std(found, ddof=1) / math.sqrt(len(found)):.3f}"


class Difference(NamedTuple):
    """Of an arm to DPO."""

    mean: float
    half_width: float  # of its 95 % interval; infinite with one seed

    @property
    def words(self) -> str:
        interval = f"{self.mean - self.half_width:+.3f} to {self.mean + self.half_width:+.3f}"
        return f"{self.mean:+.3f} ({interval})"


def table(start: Judged, arms: Sequence[Arm]) -> str:
    """A line an arm: means over seeds with their standard errors."""
    rows = [
        "| run | gold at its peak | gold at the end | KL | length | accuracy | updates |",
        "|---|---|---|---|---|---|---|",
        f"| SFT | | {start.gold.value:+.3f} | 0 | {start.length:.1f} | | |",
    ]
    for arm in arms:
        first = arm.readings[0]
        cells = [
            arm.name,
            arm.over_seeds(lambda one: _gold(one, one.peak)),
            arm.over_seeds(lambda one: _gold(one, one.last)),
            f"{np.mean([one.kl[one.last] for one in arm.readings]):.1f}",
            f"{np.mean([one.length for one in arm.readings]):.1f}",
            f"{np.mean([one.accuracy for one in arm.readings]):.3f}",
            str(first.updates),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def verdict(arms: Sequence[Arm]) -> list[str]:
    """A sentence for each moving reference at its peak and at the end, and what they come to."""
    baseline, *others = arms
    lines, wins, losses = [], 0, 0
    for arm in others:
        at_peak = difference(arm, baseline, lambda one: one.peak)
        at_end = difference(arm, baseline, lambda one: one.last)
        lines.append(
            f"{arm.name} minus {baseline.name}, gold reward: {at_peak.words} at the peak, "
            f"{at_end.words} at the end"
        )
        wins += sum(one.mean > one.half_width for one in (at_peak, at_end))
        losses += sum(one.mean < -one.half_width for one in (at_peak, at_end))
    seeds = len(baseline.readings)
    lines.append(f"(95 % intervals over {seeds} seeds, paired by seed and prompt)")
    return ["\n".join(lines), _sentence(wins, losses, seeds)]


def difference(arm: Arm, baseline: Arm, step: Callable[[Reading], int]) -> Difference:
    """Of gold rewards, each arm at its own `step`, paired by seed and prompt."""
    of_seeds = [
        float(np.mean(np.subtract(mine.golds[step(mine)], its.golds[step(its)])))
        for mine, its in zip(arm.readings, baseline.readings, strict=True)
    ]
    if len(of_seeds) == 1:
        return Difference(of_seeds[0], math.inf)
    stderr = float(np.std(of_seeds, ddof=1)) / math.sqrt(len(of_seeds))
    return Difference(float(np.mean(of_seeds)), _T.get(len(of_seeds) - 1, 2.228) * stderr)


def _sentence(wins: int, losses: int, seeds: int) -> str:
    if seeds == 1:
        return "Verdict: one seed decides nothing; raise --seeds."
    if losses and not wins:
        return (
            "Verdict: on this task the moving reference loses to DPO. It lets the policy go "
            "further from its start, and here that costs gold reward. " + ELSEWHERE
        )
    if wins and not losses:
        return "Verdict: on this task the moving reference wins over DPO."
    if wins:
        return "Verdict: on this task the moving reference wins in one place and loses in another."
    return "Verdict: on this task no difference to DPO is shown. " + ELSEWHERE


def _gold(reading: Reading, step: int) -> float:
    return float(np.mean(reading.golds[step]))
