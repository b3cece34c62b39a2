"""The picture of the exact toy: gold reward over stages, an arm a line, and what the weights are
worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fasttr.metrics.plots import BLUE, DPI, FAINT, GREEN, INK, ORANGE, PURPLE
from fasttr.toy.exact import Stage

COLOURS = {"fixed": BLUE, "weighted": GREEN, "shuffled": ORANGE, "fresh": PURPLE}
LABELS = {
    "fixed": "one reward model",
    "weighted": "refitted with density ratios (OCRM)",
    "shuffled": "refitted with shuffled ratios",
    "fresh": "refitted on new labels (the bound)",
}

Runs = Mapping[str, Sequence[Sequence[Stage]]]  # arm -> seeds -> stages


def plot_stages(panels: Mapping[str, Runs], sft: Mapping[str, float], path: Path) -> Path:
    """A column for each gold reward; line and band are mean and standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels), 3.4), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (gold, runs) in zip(axes, panels.items(), strict=True):
        for arm, seeds in runs.items():
            values = np.array([[stage.gold for stage in stages] for stages in seeds])
            start = np.full((len(values), 1), sft[gold])
            values = np.concatenate([start, values], axis=1)
            x, mean, spread = np.arange(values.shape[1]), values.mean(0), values.std(0)
            ax.plot(x, mean, color=COLOURS[arm], linewidth=1.6, label=LABELS[arm])
            ax.fill_between(x, mean - spread, mean + spread, color=COLOURS[arm], alpha=0.15, lw=0)
        ax.set_title(gold, fontsize=10, color=INK)
        ax.set_xlabel("stage", fontsize=9, color=INK)
        ax.tick_params(labelsize=8, colors=INK)
        ax.grid(True, color=FAINT, linewidth=0.4)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("gold reward of the policy", fontsize=9, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
