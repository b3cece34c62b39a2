"""Gold reward against KL: curves of a method, comparisons of a moving reference with a fixed one,
and words for them.

The seed is the unit: whatever is compared is first reduced to one number a seed, and its interval
is over seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fasttr.toy.stats import Interval, interval, words

ARMS = ("fixed", "soft", "hard")
NAMES = {
    "sigmoid": "DPO",
    "ipo_sum": "IPO (sums)",
    "ipo": "IPO (token means)",
    "kto_paired": "KTO (paired)",
}
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
    """Gold reward of one method and seed at each `kl`: every run's checkpoints joined in the order
    of their KL, and the mean over the runs (one a beta) that reach that far; NaN where none
    does."""
    paths = []
    for run in runs:
        x, y = run.column("kl"), run.column("gold")
        order = np.argsort(x, kind="stable")
        paths.append(np.interp(kl, x[order], y[order], right=np.nan))
    stacked = np.array(paths)
    there = ~np.isnan(stacked)
    return np.where(there.any(0), np.nansum(stacked, 0) / np.maximum(there.sum(0), 1), np.nan)


class Comparison(NamedTuple):
    """A moving reference less the fixed one, under one loss, by seed; `fall_*` are of each
    alone."""

    equal_kl: Interval  # gold, mean over the KL that both reach, each curve a mean over beta
    high_kl: Interval  # the same over the upper half of that KL
    same_beta: Interval  # gold at equal KL within each beta, mean over beta
    gold_at_end: Interval  # after the same number of steps, mean over beta
    kl_at_end: Interval
    length_at_end: Interval
    best_gold: Interval  # at the beta and checkpoint that the other seeds find best
    # gold lost between the checkpoint that the other seeds find best and the end, smallest beta
    fall_fixed: Interval
    fall_moving: Interval
    fall: Interval


def compare(runs: Sequence[Run], loss: str, arm: str) -> Comparison:
    fixed, moving = select(runs, loss=loss, arm="fixed"), select(runs, loss=loss, arm=arm)
    seeds, betas = seeds_of(fixed), sorted({run.beta for run in fixed})

    def paired(value: Callable[[list[Run], int], float]) -> Interval:
        return interval(value(moving, seed) - value(fixed, seed) for seed in seeds)

    def ends(key: str) -> Callable[[list[Run], int], float]:
        return lambda of, seed: float(
            np.mean([run.column(key)[-1] for run in select(of, seed=seed)])
        )

    gaps = [_gap(select(fixed, seed=seed), select(moving, seed=seed)) for seed in seeds]
    within = [
        [
            _gap(select(fixed, seed=seed, beta=beta), select(moving, seed=seed, beta=beta)).mean()
            for beta in betas
        ]
        for seed in seeds
    ]
    return Comparison(
        interval(float(gap.mean()) for gap in gaps),
        interval(float(gap[GRID // 2 :].mean()) for gap in gaps),
        interval(float(np.mean(row)) for row in within),
        paired(ends("gold")),
        paired(ends("kl")),
        paired(ends("length")),
        paired(_best),
        interval(_fall(fixed, seed) for seed in seeds),
        interval(_fall(moving, seed) for seed in seeds),
        paired(_fall),
    )


def _gap(fixed: Sequence[Run], moving: Sequence[Run]) -> np.ndarray:
    """(GRID,) gold of the moving less that of the fixed, over the KL that both reach."""
    kl = np.linspace(0, min(reach(fixed), reach(moving)), GRID)
    return curve(moving, kl) - curve(fixed, kl)


def _others(runs: Sequence[Run], seed: int) -> list[Run]:
    """The seeds that choose for this one, so that the choice is not made on the noise that it is
    judged by."""
    return [run for run in runs if run.seed != seed] or list(runs)


def _mean_path(runs: Sequence[Run], beta: float) -> np.ndarray:
    return np.mean([run.column("gold") for run in select(runs, beta=beta)], axis=0)


def _best(runs: list[Run], seed: int) -> float:
    others = _others(runs, seed)
    paths = {beta: _mean_path(others, beta) for beta in {run.beta for run in others}}
    beta = max(paths, key=lambda beta: paths[beta].max())
    return float(select(runs, seed=seed, beta=beta)[0].column("gold")[int(paths[beta].argmax())])


def _fall(runs: list[Run], seed: int) -> float:
    """Gold at the checkpoint that is best in the other seeds less gold at the end, at the smallest
    beta, which drifts
    furthest: the claim is one of high KL."""
    beta = min(run.beta for run in runs)
    gold = select(runs, seed=seed, beta=beta)[0].column("gold")
    return float(gold[int(_mean_path(_others(runs, seed), beta).argmax())] - gold[-1])


def describe(c: Comparison) -> list[str]:
    """What the intervals say of one loss and one moving reference, the paper's claim last."""
    gold = ("higher", "lower", "not shown to differ")
    falls = ("loses gold", "gains gold", "is not shown to lose gold")
    length = ("longer", "shorter", "not shown to differ in length")
    return [
        f"at equal KL its gold reward is {words(c.equal_kl, *gold)}; in the upper half of the KL "
        "that both reach it is "
        f"{words(c.high_kl, *gold)}; within the same beta it is {words(c.same_beta, *gold)}",
        f"after the same steps its KL is {words(c.kl_at_end, *gold)}, its gold reward is "
        f"{words(c.gold_at_end, *gold)}, its samples are {words(c.length_at_end, *length)}",
        f"at the best beta and checkpoint its gold reward is {words(c.best_gold, *gold)}",
        "at the smallest beta, from its best checkpoint to its end, it "
        f"{words(c.fall_moving, *falls)}, the fixed one "
        f"{words(c.fall_fixed, *falls)}; the loss is "
        f"{words(c.fall, 'larger', 'smaller', 'not shown to differ')}",
        f"**{claim(c)}**",
    ]


def claim(c: Comparison) -> str:
    """The paper's Figure 5: at high KL quality falls under a fixed reference and holds under a
    moving one."""
    parts = []
    if c.fall_fixed.sign <= 0:
        parts.append("the fixed reference is not shown to fall")
    if c.high_kl.sign <= 0:
        parts.append(
            "at equal high KL the moving one is "
            f"{'worse' if c.high_kl.sign < 0 else 'not shown to be better'}"
        )
    if c.fall_moving.sign > 0:
        parts.append("the moving one falls as well")
    return (
        "the claim holds here" if not parts else "the claim does not hold here: " + "; ".join(parts)
    )


def verdict(runs: Sequence[Run]) -> list[str]:
    """Words for every loss and moving reference, then one line on where a moving reference
    helps."""
    if (n := len(seeds_of(runs))) < 2:
        return ["one seed has no interval: nothing is claimed; ask for two or more"]
    lines, helps, hurts = [], [], []
    for loss in dict.fromkeys(run.loss for run in runs):
        for arm in ARMS[1:]:
            c, name = compare(runs, loss, arm), NAMES.get(loss, loss)
            lines += [f"{name}, {arm}: {line}" for line in describe(c)]
            for label, found in (
                ("equal KL", c.equal_kl),
                ("equal high KL", c.high_kl),
                ("equal KL and beta", c.same_beta),
                ("equal steps", c.gold_at_end),
                ("the best checkpoint", c.best_gold),
            ):
                if found.sign:
                    (helps if found.sign > 0 else hurts).append(f"{name} {arm} at {label}")
    lines.append("a moving reference gives more gold: " + ("; ".join(helps) or "nowhere shown"))
    lines.append("a moving reference gives less gold: " + ("; ".join(hurts) or "nowhere shown"))
    lines.append(
        f"intervals: 95 %, Student, over {n} seeds; each statement by itself, none corrected for "
        "their number"
    )
    return lines


def table(runs: Sequence[Run]) -> str:
    """A line a loss, beta and reference: means over seeds, at the best checkpoint of that mean and
    at the end."""
    rows = [
        "| loss | beta | reference | best gold (step) | gold at the end | KL | length | chosen | "
        "rejected | accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    losses, betas = dict.fromkeys(run.loss for run in runs), sorted({run.beta for run in runs})
    for loss, beta, arm in itertools.product(losses, betas, ARMS):
        here = select(runs, loss=loss, beta=beta, arm=arm)
        path = _mean_path(here, beta)
        best = int(path.argmax())

        def end(key: str, digits: int, error: bool = False, here: list[Run] = here) -> str:
            found = interval(run.column(key)[-1] for run in here)
            return f"{found.mean:.{digits}f}" + (
                f" +- {found.high - found.mean:.{digits}f}" if error else ""
            )

        rows.append(
            f"| {NAMES.get(loss, loss)} | {beta:g} | {arm} | {path[best]:.3f} "
            f"({here[0].rows[best]['step']}) "
            f"| {end('gold', 3, True)} | {end('kl', 1, True)} | {end('length', 1)} | "
            f"{end('logratio_chosen', 2)} "
            f"| {end('logratio_rejected', 2)} | {end('accuracy', 3)} |"
        )
    return "\n".join(rows)
