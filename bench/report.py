"""A run's folder to report.md and PNG plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import NAMES, tables_of

TITLES = {
    "peers": "fasttr and its peers",
    "head": "The loss head",
    "lerp": "The reference update",
    "step": "One optimizer step",
    "overhead": "What is not compute",
}


def write(out: Path, notes: list[str]) -> Path:
    """report.md of everything under `out`; plots where matplotlib is installed."""
    lines = ["# Benchmark report", "", *notes]
    for name in NAMES:
        # Under `out` as under results/: one folder a benchmark takes the place of the device's.
        if any(out.glob(f"*/**/{name}.json")):
            text = tables_of(name, out)
            lines += [
                "",
                f"## {TITLES[name]}",
                "",
                *(f"![]({p.name})\n" for p in plots(name, out)),
                text,
            ]
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def plots(name: str, out: Path) -> list[Path]:
    """One PNG of bars for each result of a benchmark."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return []
    made = []
    for path in sorted(out.glob(f"*/**/{name}.json")):
        groups, label = bars(name, json.loads(path.read_text()))
        if not groups:
            continue
        figure, axes = plt.subplots(
            1, len(groups), figsize=(1 + 4.5 * len(groups), 3.2), squeeze=False
        )
        for axis, (title, values) in zip(axes[0], groups.items(), strict=True):
            axis.barh(list(values), list(values.values()), color="#4c72b0")
            axis.invert_yaxis()
            axis.set_title(title, fontsize=8)
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=7)
        figure.tight_layout()
        made.append(out / f"{path.parent.name}.png")
        figure.savefig(made[-1], dpi=110)
        plt.close(figure)
    return made


def bars(name: str, result: dict[str, Any]) -> tuple[dict[str, dict[str, float]], str]:
    """(title -> provider -> value, what the value is); at most four groups, so that a plot stays
    readable."""
    if name == "peers":
        return {"": {k: p["pairs_per_second"] for k, p in result["providers"].items()}}, "pairs/s"
    keys = {
        "head": ("providers", "share_of_bare_products", "share of the bare products"),
        "lerp": ("providers", "share_of_copy", "share of the copy's bandwidth"),
        "step": ("settings", "pairs_per_second", "pairs/s"),
    }
    if name not in keys:
        return {}, ""
    group, key, label = keys[name]
    groups = {}
    for case in result["cases"][:4]:
        title = " ".join(
            str(case[k])
            for k in ("shape", "tokens", "inputs", "model", "case", "lengths")
            if k in case
        )
        groups[title] = {k: row[key] for k, row in case[group].items()}
    return {k: v for k, v in groups.items() if v}, label
