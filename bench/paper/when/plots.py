"""Pictures: one page of small multiples, and every effect with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.curves import NAMES
from bench.paper.toy_plots import finish_axes, new_figure, save_figure
from bench.paper.when.effects import OUTCOMES, Effect, Outcome, cells, levels
from bench.paper.when.runs import ARMS, MOVING
from bench.paper.when.study import Record
from fasttr.metrics.panels import BLUE, GREEN, ORANGE, PURPLE, VERMILION
from fasttr.metrics.plots import FAINT, INK
from fasttr.toy.writers import PARTS, WRITERS

LIGHT_GREEN = "#7CCBB1"
STYLES: dict[str, dict[str, Any]] = {
    "fixed": {"color": BLUE, "linewidth": 2.2},
    "soft 3": {"color": VERMILION},
    "soft 12": {"color": ORANGE},
    "hard 6": {"color": GREEN},
    "hard 24": {"color": LIGHT_GREEN},
    "smaller beta": {"color": BLUE, "linestyle": (0, (4, 2))},
    "faster": {"color": BLUE, "linestyle": (0, (1, 1.5))},
    "linear": {"color": PURPLE, "linestyle": (0, (4, 2))},
}
NAMED = {
    "fixed": "fixed reference",
    "soft 3": "soft, every 3 steps",
    "soft 12": "soft, every 12",
    "hard 6": "hard, every 6",
    "hard 24": "hard, every 24",
    "smaller beta": "fixed, beta / 5",
    "faster": "fixed, twice the rate",
    "linear": "linear margin, no reference",
}
AGAINST_KL = {"gold": "gold reward", "outside": "out of distribution"}
OVER_STEPS = {
    "chosen": "chosen, log-ratio",
    "rejected": "rejected, log-ratio",
    "length": "length",
    "accuracy": "accuracy",
}
KL_TICKS = (0, 0.2, 1, 2, 4, 8, 16, 32)


def plot_paths(records: Sequence[Record], path: Path) -> None:
    """A column a writer; gold and mass out of distribution against KL for each part, the rest over
    the steps. Lines are means over settings, bars standard errors at the end."""
    rows = [(key, part) for key in AGAINST_KL for part in PARTS]
    n_rows = len(rows) + len(OVER_STEPS)
    size = (3.1 * len(WRITERS) + 0.4, 1.75 * n_rows + 0.8)
    figure, axes = new_figure(n_rows, len(WRITERS), size, sharey="none")
    for column, writer in enumerate(WRITERS):
        here = [record for record in records if record.setting.writer == writer]
        for ax, (key, part) in zip(axes[:, column], rows, strict=False):
            _against_kl(ax, [r for r in here if r.setting.part == part], key)
        for ax, key in zip(axes[len(rows) :, column], OVER_STEPS, strict=True):
            _over_steps(ax, here, key)
        axes[0][column].set_title(f"pairs by {writer}", fontsize=11, color=INK)
        axes[len(rows) - 1][column].set_xlabel("KL, nats (root scale)", fontsize=8, color=INK)
        axes[-1][column].set_xlabel("optimizer step", fontsize=8, color=INK)
    labels = [f"{AGAINST_KL[key]}\npairs part {part}" for key, part in rows]
    for ax, label in zip(axes[:, 0], [*labels, *OVER_STEPS.values()], strict=True):
        ax.set_ylabel(label, fontsize=8, color=INK)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        "Means over loss, beta and label noise; bars: standard error at the end",
        fontsize=10,
        color=INK,
    )
    save_figure(figure, path)


def _against_kl(ax: Any, records: Sequence[Record], key: str) -> None:
    furthest = 0.1
    for arm in ARMS:
        kl, values = (_stacked(records, arm, column) for column in ("kl", key))
        if len(kl) == 0:
            continue
        x, y = np.maximum(kl.mean(axis=0), 0), values.mean(axis=0)
        furthest = max(furthest, x.max())
        ax.plot(x, y, marker="o", markersize=2.2, **_style(arm))
        if len(kl) > 1:
            of_mean = len(kl) ** 0.5
            bars = {"xerr": kl[:, -1].std(ddof=1), "yerr": values[:, -1].std(ddof=1)}
            bars = {axis: error / of_mean for axis, error in bars.items()}
            colour = STYLES[arm]["color"]
            ax.errorbar(x[-1], y[-1], **bars, color=colour, linewidth=0.7, alpha=0.6)
    ax.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    ax.set_xticks(KL_TICKS, [f"{tick:g}" for tick in KL_TICKS])
    ax.set_xlim(0, 1.1 * furthest)
    finish_axes(ax)


def _over_steps(ax: Any, records: Sequence[Record], key: str) -> None:
    for arm in ARMS:
        values = _stacked(records, arm, key)
        if len(values):
            steps = _stacked(records, arm, "step")[0]
            ax.plot(steps, values.mean(axis=0), **_style(arm))
    finish_axes(ax)


def _stacked(records: Sequence[Record], arm: str, key: str) -> np.ndarray:
    """(settings, measurements)."""
    return np.array([record.column(key) for record in records if record.arm == arm])


def _style(arm: str) -> dict[str, Any]:
    return {"linewidth": 1.3, "label": NAMED[arm], **STYLES[arm]}


def plot_effects(found: Mapping[Outcome, Mapping[tuple[str, str], Effect]], path: Path) -> None:
    """A panel an outcome that has a good sign, a line a level, a point a moving reference, with the
    simultaneous interval."""
    outcomes = [outcome for outcome in OUTCOMES[:5] if outcome in found]
    names = [*levels(), *cells()]
    figure, axes = new_figure(1, len(outcomes), (2.9 * len(outcomes) + 1.2, 0.36 * len(names) + 1))
    for ax, outcome in zip(axes[0], outcomes, strict=True):
        for i, arm in enumerate(MOVING):
            of_arm = [found[outcome][arm, name] for name in names]
            y = np.arange(len(names)) + 0.18 * (i - 1.5)
            mean = np.array([effect.mean if effect.seeds else np.nan for effect in of_arm])
            high = np.array([effect.high for effect in of_arm])
            half = np.where(np.isfinite(high), high - mean, 0)
            ax.errorbar(
                mean,
                y,
                xerr=half,
                fmt="o",
                markersize=3,
                linewidth=1.1,
                color=STYLES[arm]["color"],
                label=NAMED[arm],
            )
        ax.axvline(0, color=INK, linewidth=0.7)
        for boundary in _boundaries(names):
            ax.axhline(boundary, color=FAINT, linewidth=0.4)
        ax.set_title(_broken(outcome.name), fontsize=9, color=INK)
        side = "right" if outcome.good > 0 else "left"
        ax.set_xlabel(f"moving less fixed; {side} is better", fontsize=8, color=INK)
        ax.set_yticks(range(len(names)), [readable(name) for name in names])
        finish_axes(ax)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path)


def _boundaries(names: Sequence[str]) -> list[float]:
    """Between the levels of one factor and those of the next."""
    groups = ["cell" if " x " in name else name.split()[0] for name in names]
    return [i - 0.5 for i in range(1, len(groups)) if groups[i] != groups[i - 1]]


def _broken(title: str) -> str:
    """Two lines."""
    words = title.split()
    middle = (len(words) + 1) // 2
    return " ".join(words[:middle]) + "\n" + " ".join(words[middle:])


def readable(level: str) -> str:
    """The level, losses as people call them."""
    for loss, name in NAMES.items():
        if level == f"loss {loss}":
            return f"loss {name}"
    return level
