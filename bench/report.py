"""A run's folder to report.md and PNG plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.registry import BENCHMARKS
from bench.tables import NAMES, PEERS, tables_of

PEERS_TITLE = "fasttr and its peers"
PLOTTED_CASES = 4  # so that a plot stays readable
NAMED_BY = ("shape", "tokens", "inputs", "arch", "model", "case", "lengths")


class Plot(NamedTuple):
    """Bars of one case."""

    title: str
    values: dict[str, float]  # provider -> value
    label: str


def title_of(name: str) -> str:
    return PEERS_TITLE if name == PEERS else BENCHMARKS[name].title


def write(out: Path, notes: list[str]) -> Path:
    """report.md of everything under `out`; plots where matplotlib is installed."""
    lines = ["# Benchmark report", "", *notes]
    for name in NAMES:
        # Under `out` as under results/: one folder a benchmark takes the place of the device's.
        if any(out.glob(f"*/**/{name}.json")):
            pictures = [f"![]({path.name})\n" for path in plots(name, out)]
            lines += ["", f"## {title_of(name)}", "", *pictures, tables_of(name, out)]
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def plots(name: str, out: Path) -> list[Path]:
    """One PNG of bars for each result of a benchmark."""
    made = []
    for path in sorted(out.glob(f"*/**/{name}.json")):
        found = list(bars(name, json.loads(path.read_text())))
        place = out / f"{path.parent.name}.png"
        if found and draw(found, place):
            made.append(place)
    return made


def bars(name: str, result: dict[str, Any]) -> Iterator[Plot]:
    if name == PEERS:
        rates = {key: row["pairs_per_second"] for key, row in result["providers"].items()}
        yield Plot("", rates, "pairs/s")
        return
    shown = BENCHMARKS[name].bars
    if shown is None:
        return
    for case in result["cases"][:PLOTTED_CASES]:
        title = " ".join(str(case[key]) for key in NAMED_BY if key in case)
        values = {key: row[shown.value] for key, row in case[shown.rows].items()}
        if values:
            yield Plot(title, values, shown.label)


def draw(found: list[Plot], place: Path) -> bool:
    """Write a PNG; False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    size = (1 + 4.5 * len(found), 3.2)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False)
    for axis, plot in zip(axes[0], found, strict=True):
        axis.barh(list(plot.values), list(plot.values.values()), color="#4c72b0")
        axis.invert_yaxis()
        axis.set_title(plot.title, fontsize=8)
        axis.set_xlabel(plot.label, fontsize=8)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(place, dpi=110)
    plt.close(figure)
    return True
