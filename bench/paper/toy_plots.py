"""Pictures of the toy MDP: curves over training like the paper's Figure 2, and where the seeds
end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.mdp import History
from fasttr.metrics.panels import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from fasttr.metrics.plots import DPI, FAINT, INK
from fasttr.reference.schedule import Schedule, Soft

ARM_COLOURS = {"fixed": BLUE, "soft": VERMILION, "hard": GREEN}


def plot_figure(
    arms: Mapping[str, History],
    title: str,
    loss: str,
    schedules: Mapping[str, Schedule],
    path: Path,
) -> None:
    """A column an arm; above the mass out of distribution, below that of the chosen and rejected
    paths.

    Line and band: mean and standard deviation over seeds; dashes: median; dots: 10 and 90 %.
    """
    figure, axes = new_figure(2, len(arms), (3.2 * len(arms), 5.0))
    for column, (arm, history) in enumerate(arms.items()):
        above, below = axes[0][column], axes[1][column]
        _curve(above, history.ood, PURPLE, "out of distribution")
        _curve(below, history.chosen, BLUE, "chosen")
        _curve(below, history.rejected, ORANGE, "rejected")
        above.set_title(_name(loss, arm, schedules[arm]), fontsize=10, color=INK)
        below.set_xlabel("step", fontsize=9, color=INK)
        for ax in (above, below):
            ax.set_ylim(-0.03, 1.03)
            finish_axes(ax)
    axes[0][0].set_ylabel("probability", fontsize=9, color=INK)
    axes[1][0].set_ylabel("probability", fontsize=9, color=INK)
    keys = [ax.get_legend_handles_labels() for ax in (axes[0][0], axes[1][0])]
    handles, labels = keys[0][0] + keys[1][0], keys[0][1] + keys[1][1]
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.suptitle(
        f"{title}\nline, band: mean, std; dashes: median; dots: 10 and 90 %", fontsize=10, color=INK
    )
    save_figure(figure, path)


def plot_finals(
    cells: Mapping[tuple[str, float], Mapping[str, History]], title: str, path: Path
) -> None:
    """Final mass out of distribution of every seed: a group a loss and beta, a column an arm, bars
    at the means."""
    figure, [[ax]] = new_figure(1, 1, (max(6.4, 1.25 * len(cells)), 3.6))
    rng = np.random.default_rng(0)  # of the jitter
    for i, arms in enumerate(cells.values()):
        for j, (arm, history) in enumerate(arms.items()):
            x, y = i + 0.26 * (j - 1), history.ood[-1]
            ax.scatter(
                x + 0.16 * (rng.random(len(y)) - 0.5),
                y,
                s=5,
                alpha=0.35,
                linewidths=0,
                color=ARM_COLOURS[arm],
            )
            ax.plot(
                [x - 0.11, x + 0.11],
                [y.mean()] * 2,
                color=ARM_COLOURS[arm],
                linewidth=2.4,
                label=f"{arm} reference" if i == 0 else None,
            )
            ax.plot(
                [x - 0.11, x + 0.11],
                [np.median(y)] * 2,
                color=INK,
                linewidth=1.0,
                linestyle=(0, (2, 1.2)),
                label="median" if i == 0 and j == len(arms) - 1 else None,
            )
        start = next(iter(arms.values())).ood[0].mean()
        ax.plot(
            [i - 0.42, i + 0.42],
            [start] * 2,
            color=INK,
            linewidth=0.7,
            linestyle=(0, (1, 2)),
            zorder=0,
            label="mean before training" if i == 0 else None,
        )
    ax.set_xticks(range(len(cells)), [f"{name}\nbeta {beta:g}" for name, beta in cells], fontsize=9)
    ax.set_ylabel("probability", fontsize=9, color=INK)
    ax.set_ylim(-0.03, 1.03)
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    finish_axes(ax)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    save_figure(figure, path)


def _curve(ax: Any, values: np.ndarray, colour: str, label: str) -> None:
    steps = np.arange(len(values))
    mean, std = values.mean(1), values.std(1)
    low, mid, high = np.quantile(values, [0.1, 0.5, 0.9], axis=1)
    ax.fill_between(
        steps,
        np.clip(mean - std, 0, 1),
        np.clip(mean + std, 0, 1),
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
    ax.plot(steps, mean, color=colour, linewidth=1.8, label=label)
    ax.plot(steps, mid, color=colour, linewidth=1.1, linestyle=(0, (4, 2)))
    for quantile in (low, high):
        ax.plot(steps, quantile, color=colour, linewidth=0.8, linestyle=(0, (1, 1.6)))


def _name(loss: str, arm: str, schedule: Schedule) -> str:
    if arm == "fixed":
        return loss
    every = "every step" if schedule.every == 1 else f"every {schedule.every} steps"
    return (
        f"TR-{loss} soft, {schedule.alpha:g} {every}"
        if isinstance(schedule, Soft)
        else f"TR-{loss} hard, {every}"
    )


def new_figure(
    rows: int, columns: int, size: tuple[float, float], sharey: str = "row"
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def finish_axes(ax: Any) -> None:
    ax.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)


def save_figure(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI * 0.75)
