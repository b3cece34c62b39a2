"""Pictures of the over-optimisation study: gold reward against KL, and both over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.curves import ARMS, GRID, NAMES, Run, curve, reach, seeds_of, select
from bench.paper.toy_plots import ARM_COLOURS, finish_axes, new_figure, save_figure
from fasttr.metrics.plots import INK
from fasttr.toy.stats import interval

MARKERS = ("o", "s", "^", "D", "v", "P")
ROWS = {
    "gold": "gold reward",
    "kl": "KL to the initial policy",
    "length": "length",
    "logratio_chosen": "chosen, log-ratio",
    "logratio_rejected": "rejected, log-ratio",
}


def plot_gold_against_kl(runs: Sequence[Run], path: Path) -> None:
    """A panel a loss, a thick curve a reference: mean over seeds with its 95 % interval; thin ones
    for each beta."""
    losses = list(dict.fromkeys(run.loss for run in runs))
    figure, axes = new_figure(1, len(losses), (3.7 * len(losses) + 0.4, 4.0))
    betas = sorted({run.beta for run in runs})
    for ax, loss in zip(axes[0], losses, strict=True):
        for arm in ARMS:
            here = select(runs, loss=loss, arm=arm)
            for beta, marker in zip(betas, MARKERS, strict=False):
                x, y = (
                    np.mean([run.column(k) for run in select(here, beta=beta)], axis=0)
                    for k in ("kl", "gold")
                )
                ax.plot(
                    np.maximum(x, 0),
                    y,
                    color=ARM_COLOURS[arm],
                    linewidth=0.7,
                    alpha=0.6,
                    marker=marker,
                    markersize=3.6,
                    markeredgewidth=0,
                )
            kl = np.linspace(0, reach(here), GRID)
            by_seed = np.array([curve(select(here, seed=seed), kl) for seed in seeds_of(here)])
            _band(ax, kl, by_seed, ARM_COLOURS[arm], f"{arm} reference")
        ax.set_title(NAMES.get(loss, loss), fontsize=11, color=INK)
        ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        ax.set_xticks([0, 0.5, 1, 2, 4, 8, 16, 32], ["0", "0.5", "1", "2", "4", "8", "16", "32"])
        ax.set_xlim(0, 1.05 * max(reach(select(runs, loss=loss)), 1e-3))
        ax.set_xlabel(
            "KL to the initial policy, nats a completion (root scale)", fontsize=9, color=INK
        )
        finish_axes(ax)
    axes[0][0].set_ylabel("gold reward of fresh samples", fontsize=9, color=INK)
    for beta, marker in zip(betas, MARKERS, strict=False):
        axes[0][0].plot(
            [], [], color=INK, linewidth=0.7, marker=marker, markersize=4, label=f"beta {beta:g}"
        )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    n = len(seeds_of(runs))
    title = (
        f"Gold reward against drift, {n} seeds. "
        "Thick: mean as far as every seed reaches, and its 95 % interval"
    )
    figure.suptitle(f"{title}; thin: each beta over its checkpoints", fontsize=10, color=INK)
    save_figure(figure, path)


def plot_steps(runs: Sequence[Run], path: Path) -> None:
    """A column a loss, a row a measure over the steps: mean over beta and seeds, interval over
    seeds."""
    losses = list(dict.fromkeys(run.loss for run in runs))
    figure, axes = new_figure(
        len(ROWS), len(losses), (3.2 * len(losses) + 0.4, 1.75 * len(ROWS) + 0.6)
    )
    for column, loss in enumerate(losses):
        for row, (key, label) in enumerate(ROWS.items()):
            ax = axes[row][column]
            for arm in ARMS:
                here = select(runs, loss=loss, arm=arm)
                steps = here[0].column("step")
                by_seed = np.array(
                    [
                        np.mean([run.column(key) for run in select(here, seed=seed)], axis=0)
                        for seed in seeds_of(here)
                    ]
                )
                _band(ax, steps, by_seed, ARM_COLOURS[arm], f"{arm} reference")
            finish_axes(ax)
            if column == 0:
                ax.set_ylabel(label, fontsize=8, color=INK)
        axes[0][column].set_title(NAMES.get(loss, loss), fontsize=11, color=INK)
        axes[-1][column].set_xlabel("optimizer step", fontsize=9, color=INK)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    save_figure(figure, path)


def _band(ax: Any, x: np.ndarray, by_seed: np.ndarray, colour: str, label: str) -> None:
    """Mean and interval where every seed has a value: beyond, the seeds that are left would bend
    the mean."""
    there = ~np.isnan(by_seed).any(axis=0)
    found = [interval(column) for column in by_seed.T[there]]
    ax.plot(x[there], [f.mean for f in found], color=colour, linewidth=1.9, label=label)
    ax.fill_between(
        x[there],
        [f.low for f in found],
        [f.high for f in found],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
