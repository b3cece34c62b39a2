"""Gold reward against KL: curves of a method, comparisons of a moving reference with a fixed one, and words for them.

The seed is the unit: whatever is compared is first reduced to one number a seed, and its interval is over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.paper.stats import Interval, interval, words

ARMS = ("fixed", "soft", "hard")
NAMES = {"sigmoid": "DPO", "ipo_sum": "IPO (sums)", "ipo": "IPO (token means)", "kto_paired": "KTO (paired)"}
GRID = 200  # points of KL at which curves are read


class Run(NamedTuple):
    """One training run: a row a checkpoint, the initial policy (KL 0) first."""

    loss: str
    arm: str
    beta: float
    seed: int
    rows: list[dict[str, Any]]

    def column(self, key: str) -> np.ndarray:
        return np.array([row.get(key, np.nan) for row in self.rows], dtype=np.float64)


def select(runs: Sequence[Run], **wanted: Any) -> list[Run]:
    return [run for run in runs if all(getattr(run, key) == value for key, value in wanted.items())]


def seeds_of(runs: Sequence[Run]) -> list[int]:
    return sorted({run.seed for run in runs})


def reach(runs: Sequence[Run]) -> float:
    """The largest KL of any checkpoint."""
    return max((float(run.column("kl").max()) for run in runs), default=0.0)


def curve(runs: Sequence[Run], kl: np.ndarray) -> np.ndarray:
    """Gold reward of one method and seed at each `kl`: every run's checkpoints joined in the order of their KL, and
    the mean over the runs (one a beta) that reach that far; NaN where none does."""
    paths = []
    for run in runs:
        x, y = run.column("kl"), run.column("gold")
        order = np.argsort(x, kind="stable")
        paths.append(np.interp(kl, x[order], y[order], right=np.nan))
    stacked = np.array(paths)
    there = ~np.isnan(stacked)
    return np.where(there.any(0), np.nansum(stacked, 0) / np.maximum(there.sum(0), 1), np.nan)


class Comparison(NamedTuple):
    """A moving reference less the fixed one, under one loss, by seed; `fall_*` are of each alone."""

    gold_at_equal_kl: Interval  # mean over the KL that both reach
    gold_at_high_kl: Interval  # over the upper half of it
    gold_at_end: Interval  # after the same number of steps, mean over beta
    kl_at_end: Interval
    length_at_end: Interval
    best_gold: Interval  # at the beta and checkpoint that the other seeds find best
    fall_fixed: Interval  # gold lost between the checkpoint that the other seeds find best and the end, mean over beta
    fall_moving: Interval
    fall: Interval


def compare(runs: Sequence[Run], loss: str, arm: str) -> Comparison:
    fixed, moving = select(runs, loss=loss, arm="fixed"), select(runs, loss=loss, arm=arm)
    seeds = seeds_of(fixed)

    def paired(value: Callable[[list[Run], int], float]) -> Interval:
        return interval(value(moving, seed) - value(fixed, seed) for seed in seeds)

    def ends(key: str) -> Callable[[list[Run], int], float]:
        return lambda of, seed: float(np.mean([run.column(key)[-1] for run in select(of, seed=seed)]))

    equal, high = [], []
    for seed in seeds:
        a, b = select(fixed, seed=seed), select(moving, seed=seed)
        kl = np.linspace(0, min(reach(a), reach(b)), GRID)
        gap = curve(b, kl) - curve(a, kl)
        equal.append(float(gap.mean()))
        high.append(float(gap[GRID // 2 :].mean()))
    return Comparison(
        interval(equal), interval(high), paired(ends("gold")), paired(ends("kl")), paired(ends("length")),
        paired(_best), interval(_fall(fixed, s) for s in seeds), interval(_fall(moving, s) for s in seeds), paired(_fall),
    )  # fmt: skip


def _others(runs: Sequence[Run], seed: int) -> list[Run]:
    """The seeds that choose for this one, so that the choice is not made on the noise that it is judged by."""
    return [run for run in runs if run.seed != seed] or list(runs)


def _mean_path(runs: Sequence[Run], beta: float) -> np.ndarray:
    return np.mean([run.column("gold") for run in select(runs, beta=beta)], axis=0)


def _best(runs: list[Run], seed: int) -> float:
    others = _others(runs, seed)
    paths = {beta: _mean_path(others, beta) for beta in {run.beta for run in others}}
    beta = max(paths, key=lambda beta: paths[beta].max())
    return float(select(runs, seed=seed, beta=beta)[0].column("gold")[int(paths[beta].argmax())])


def _fall(runs: list[Run], seed: int) -> float:
    """Gold at the checkpoint that is best in the other seeds less gold at the end, mean over beta."""
    others = _others(runs, seed)
    falls = []
    for run in select(runs, seed=seed):
        gold = run.column("gold")
        falls.append(gold[int(_mean_path(others, run.beta).argmax())] - gold[-1])
    return float(np.mean(falls))


def describe(c: Comparison, name: str, arm: str) -> list[str]:
    """What the intervals say of one loss and one moving reference, the paper's claim last."""
    lines = [
        "at equal KL its gold reward is " + words(c.gold_at_equal_kl, "higher", "lower", "not shown to differ"),
        "in the upper half of the KL that both reach it is "
        + words(c.gold_at_high_kl, "higher", "lower", "not shown to differ"),
        "after the same steps it has drifted " + words(c.kl_at_end, "further", "less far", "about as far") + " nats, its gold "
        "reward is " + words(c.gold_at_end, "higher", "lower", "not shown to differ") + ", its samples are "
        + words(c.length_at_end, "longer", "shorter", "about as long"),
        "the best beta and checkpoint give " + words(c.best_gold, "more gold", "less gold", "no different gold shown"),
        "from its best checkpoint on it " + words(c.fall_moving, "loses gold", "gains gold", "is not shown to lose gold")
        + ", the fixed one " + words(c.fall_fixed, "loses gold", "gains gold", "is not shown to lose gold")
        + ", the difference: " + words(c.fall, "it loses more", "it loses less", "none shown"),
    ]  # fmt: skip
    return [f"{name}, {arm}: {line}" for line in lines] + [f"**{name}, {arm}: {claim(c)}**"]


def claim(c: Comparison) -> str:
    """The paper's Figure 5: at high KL quality falls under a fixed reference and holds under a moving one."""
    parts = []
    if c.fall_fixed.sign <= 0:
        parts.append("the fixed reference is not shown to fall, so there is nothing to mend")
    if c.gold_at_high_kl.sign <= 0:
        parts.append("at equal high KL the moving one is " + ("worse" if c.gold_at_high_kl.sign < 0 else "not shown better"))
    if c.fall_moving.sign > 0:
        parts.append("the moving one falls as well")
    return "the claim holds here" if not parts else "the claim does not hold here: " + "; ".join(parts)


def verdict(runs: Sequence[Run]) -> list[str]:
    """Words for every loss and moving reference, then one line on where a moving reference helps."""
    lines, helps, hurts = [], [], []
    for loss in dict.fromkeys(run.loss for run in runs):
        for arm in ARMS[1:]:
            c, name = compare(runs, loss, arm), NAMES.get(loss, loss)
            lines += describe(c, name, arm)
            for label, found in (
                ("equal KL", c.gold_at_equal_kl), ("equal high KL", c.gold_at_high_kl),
                ("equal steps", c.gold_at_end), ("the best checkpoint", c.best_gold),
            ):  # fmt: skip
                if found.sign:
                    (helps if found.sign > 0 else hurts).append(f"{name} {arm} at {label}")
    n = len(seeds_of(runs))
    lines.append("a moving reference gives more gold: " + ("; ".join(helps) or "nowhere shown"))
    lines.append("a moving reference gives less gold: " + ("; ".join(hurts) or "nowhere shown"))
    lines.append(f"intervals: 95 %, Student, over {n} seeds; each statement by itself, none corrected for their number")
    return lines


def table(runs: Sequence[Run]) -> str:
    """A line a loss, beta and reference: means over seeds at the end of the run, and the best checkpoint."""
    rows = [
        "| loss | beta | reference | gold at its best (step) | gold at the end | KL | length | chosen | rejected | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for loss in dict.fromkeys(run.loss for run in runs):
        for beta in sorted({run.beta for run in select(runs, loss=loss)}):
            for arm in ARMS:
                here = select(runs, loss=loss, beta=beta, arm=arm)
                path, ends = _mean_path(here, beta), {}
                for key in ("gold", "kl", "length", "logratio_chosen", "logratio_rejected", "accuracy"):
                    found = interval(run.column(key)[-1] for run in here)
                    ends[key] = (found.mean, (found.high - found.low) / 2)
                best = int(path.argmax())
                rows.append(
                    f"| {NAMES.get(loss, loss)} | {beta:g} | {arm} | {path[best]:.3f} ({here[0].rows[best]['step']}) "
                    f"| {ends['gold'][0]:.3f} +- {ends['gold'][1]:.3f} | {ends['kl'][0]:.1f} +- {ends['kl'][1]:.1f} "
                    f"| {ends['length'][0]:.1f} | {ends['logratio_chosen'][0]:+.2f} | {ends['logratio_rejected'][0]:+.2f} "
                    f"| {ends['accuracy'][0]:.3f} |"
                )
    return "\n".join(rows)
