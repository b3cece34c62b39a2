"""Pictures drawn from metrics.jsonl: of one run (`plot_run`), or of several on the same axes
(`plot_comparison`).

What a run did not record is not drawn: a run of SFT has no rewards, one without a gold reward no
gold picture.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fasttr.errors import FasttrError
from fasttr.metrics.panels import (
    BLACK,
    BLUE,
    COMPARISONS,
    GREEN,
    ORANGE,
    PURPLE,
    RUN_PANELS,
    SKY,
    VERMILION,
    Compared,
    Curve,
    Panel,
)
from fasttr.metrics.ties import without_ties

RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
RUN_STYLES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
INK = "#333333"
FAINT = "#BBBBBB"
MAX_MARKS = 40  # lines for reference updates; above it every k-th is drawn
OVERVIEW = 6  # panels of comparison.png
SMOOTH_FROM = 60  # points; a longer training curve is drawn faintly with its moving average on top
WIDTH, HEIGHT, DPI = 6.4, 3.6, 160


def plot_run(run_dir: str | Path) -> list[Path]:
    """Write RUN/plots/*.png from RUN/metrics.jsonl and return their paths; see `RUN_PANELS`.

    Thin vertical lines mark where the reference moved. Raises FasttrError when there is nothing to
    read or to draw.
    """
    run_dir = Path(run_dir)
    figures = run_figures(read_metrics(run_dir), run_dir.resolve().name)
    if not figures:
        raise FasttrError(
            f"{run_dir / 'metrics.jsonl'} holds no metric that is drawn; wanted a loss at least"
        )
    return [_save(figure, run_dir / "plots" / f"{name}.png") for name, figure in figures.items()]


def run_figures(lines: list[dict[str, Any]], run_name: str) -> dict[str, Any]:
    """Every picture of a run by its name, as matplotlib Figures."""
    found = {panel.name: panel_figure(panel, lines, run_name) for panel in RUN_PANELS}
    return {name: figure for name, figure in found.items() if figure is not None}


def panel_figure(panel: Panel, lines: list[dict[str, Any]], run_name: str = "") -> Any:
    """One picture as a matplotlib Figure; None where the run recorded none of its curves."""
    lines = [without_ties(line) for line in lines]
    curves = [curve for curve in panel.curves if series(lines, curve.key)[0]]
    if not curves:
        return None
    curves = [
        curve
        for place, curve in enumerate(curves)
        if not any(_is_the_same(lines, curve, later) for later in curves[place + 1 :])
    ]
    figure, (ax,) = _figure(1)
    _draw_panel(ax, panel, curves, lines)
    _legend(figure, ax)
    _sign(figure, run_name)
    return figure


def plot_comparison(runs: Mapping[str, str | Path], output_dir: str | Path) -> list[Path]:
    """Several runs on the same axes: one PNG a metric in `output_dir`, and comparison.png with the
    first six.

    runs: name shown -> run folder. Marks at the top of a panel are a run's reference updates.
    """
    data = {name: read_metrics(folder) for name, folder in runs.items()}
    figures = comparison_figures(data)
    return [_save(figure, Path(output_dir) / f"{name}.png") for name, figure in figures.items()]


def comparison_figures(data: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Pictures of several runs by their names, an overview first; FasttrError where the runs have
    nothing to compare.

    data: name shown -> lines of metrics.
    """
    shown = {name: [without_ties(line) for line in lines] for name, lines in data.items()}
    found = [(panel, _shown_key(panel, shown)) for panel in COMPARISONS]
    panels = [(panel, key) for panel, key in found if key is not None]
    if not panels:
        raise FasttrError(
            f"none of the runs {', '.join(data)} has a metric to compare; wanted a loss at least"
        )
    pages = {"comparison": panels[:OVERVIEW], **{pair[0].name: [pair] for pair in panels}}
    figures = {}
    for name, chosen in pages.items():
        figure, axes = _figure(len(chosen))
        for ax, (panel, key) in zip(axes, chosen, strict=True):
            _draw_compared(ax, panel, key, shown)
        _legend(figure, axes[0])
        figures[name] = figure
    return figures


def run_names(folders: Sequence[str | Path]) -> dict[str, Path]:
    """A name for every run folder: as much of the end of its path as tells it from the others.

    FasttrError for a folder that is given twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise FasttrError(f"{twice} is given twice; wanted different runs")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, map(Path, folders), strict=True))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl. A last line without its newline, as a live run has, is left
    out when torn."""
    path = Path(run_dir) / "metrics.jsonl"
    if not Path(run_dir).is_dir():
        raise FasttrError(f"run {run_dir} does not exist; wanted the output_dir of a run")
    if not path.is_file():
        raise FasttrError(
            f"run {run_dir} has no metrics.jsonl; wanted the output_dir of a run that has logged"
        )
    texts = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            if not text.strip():
                continue
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("wanted a JSON object with an integer step")
        except ValueError as error:
            if number == len(texts):
                break
            raise FasttrError(
                f"{path}, line {number}: {error}; mend or remove that line"
            ) from error
        lines.append(line)
    return lines


def series(
    lines: list[dict[str, Any]], key: str, over: str = "step"
) -> tuple[list[float], list[float]]:
    """(x, y) where a line has finite values of both."""
    pairs = [
        (line[over], line[key])
        for line in lines
        if _finite(line.get(over)) and _finite(line.get(key))
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def reference_moves(lines: list[dict[str, Any]]) -> list[int]:
    """The steps at which the reference moved."""
    return sorted({line["step"] for line in lines if line.get("event") == "reference_update"})


def _shown_key(panel: Compared, data: dict[str, list[dict[str, Any]]]) -> str | None:
    has_better = any(series(lines, panel.unless)[0] for lines in data.values())
    for key in () if has_better else panel.keys:
        if any(series(lines, key, panel.over)[0] for lines in data.values()):
            return key
    return None


def _is_the_same(lines: list[dict[str, Any]], curve: Curve, other: Curve) -> bool:
    """Whether another curve would hide this one, as that against the initial policy hides the one
    against a reference that never moves."""
    if not (curve.held_out and other.held_out):
        return False
    mine, its = series(lines, curve.key), series(lines, other.key)
    return mine[0] == its[0] and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(mine[1], its[1], strict=True)
    )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _draw_panel(ax: Any, panel: Panel, curves: list[Curve], lines: list[dict[str, Any]]) -> None:
    moves = reference_moves(lines)
    if panel.level is not None:
        ax.axhline(
            panel.level,
            color=INK,
            linewidth=0.7,
            linestyle=(0, (1, 3)),
            label=panel.level_label or None,
        )
    for curve in curves:
        x, y = series(lines, curve.key)
        if curve.held_out:
            style: dict[str, Any] = {"linestyle": (0, (4, 1.5)), "marker": "o", "markersize": 4}
            ax.plot(x, y, color=curve.colour, linewidth=1.5, label=curve.label, **style)
            _band(ax, lines, curve.key, curve.stderr, "step", curve.colour)
        else:
            _smooth(ax, x, y, moves if panel.restarts else [], curve.colour, label=curve.label)
    every = -(-len(moves) // MAX_MARKS)
    for i, step in enumerate(moves[every - 1 :: every] if moves else []):
        label = "reference update" if every == 1 else f"every {every}th reference update"
        ax.axvline(step, color=FAINT, linewidth=0.7, zorder=0, label=None if i else label)
    _finish(ax, panel.title, panel.unit, "optimizer step")


def _draw_compared(
    ax: Any, panel: Compared, key: str, data: Mapping[str, list[dict[str, Any]]]
) -> None:
    all_moves = []
    for i, (name, lines) in enumerate(data.items()):
        x, y = series(lines, key, panel.over)
        moves = reference_moves(lines) if panel.over == "step" else []
        colour = RUN_COLOURS[i % len(RUN_COLOURS)]
        style = RUN_STYLES[i % len(RUN_STYLES)]
        if not key.startswith("eval_"):
            _smooth(ax, x, y, [] if key.startswith("logps") else moves, colour, style, label=name)
        else:
            marks: dict[str, Any] = {"linestyle": style, "marker": "o", "markersize": 3.5}
            ax.plot(x, y, color=colour, linewidth=1.6, label=name, **marks)
            if panel.over == "step":
                _band(ax, lines, key, f"{key}_stderr", panel.over, colour)
            else:
                _crosses(ax, lines, key, panel.over, colour)
        if moves:
            all_moves.append((moves, colour))
    if panel.level is not None:
        ax.axhline(panel.level, color=INK, linewidth=0.7, linestyle=(0, (1, 3)))
        where = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1, panel.level, f" {panel.level_label}", fontsize=8, color=INK, **where)
    _mark_moves(ax, all_moves)
    title = panel.title
    if panel.restarts and all_moves:
        title += " (restarts)"
    _finish(ax, title, panel.unit, panel.over_unit)


def _mark_moves(ax: Any, all_moves: list[tuple[list[int], str]]) -> None:
    """A row of ticks a run along the top, outside the scale of the values."""
    for row, (moves, colour) in enumerate(all_moves):
        every = -(-len(moves) // MAX_MARKS)
        shown = moves[every - 1 :: every]
        height = 1.0 - 0.035 * row
        ax.plot(
            shown,
            [height] * len(shown),
            "|",
            color=colour,
            markersize=5,
            markeredgewidth=1.0,
            transform=ax.get_xaxis_transform(),
            clip_on=False,
            label=None if row else "reference updates",
        )


def _smooth(
    ax: Any,
    x: list[float],
    y: list[float],
    moves: list[int],
    colour: str,
    style: Any = "-",
    label: str = "",
) -> None:
    if len(x) < SMOOTH_FROM:
        ax.plot(x, y, color=colour, linestyle=style, linewidth=1.6, label=label)
        return
    half = len(y) // 50 + 1
    # No mean reaches over a move, where the metrics start afresh; with hundreds of moves nothing
    # else would be left.
    window = [bisect_left(moves, step) if len(moves) <= MAX_MARKS else 0 for step in x]
    means = []
    for i, inside in enumerate(window):
        near = range(max(0, i - half), min(len(y), i + half + 1))
        values = [y[j] for j in near if window[j] == inside]
        means.append(sum(values) / len(values))
    ax.plot(x, y, color=colour, linewidth=0.6, alpha=0.25)
    ax.plot(x, means, color=colour, linestyle=style, linewidth=1.6, label=label)


def _band(
    ax: Any, lines: list[dict[str, Any]], key: str, stderr: str, over: str, colour: str
) -> None:
    rows = [line for line in lines if all(_finite(line.get(k)) for k in (over, key, stderr))]
    low, high = ([line[key] + sign * line[stderr] for line in rows] for sign in (-1, 1))
    ax.fill_between([line[over] for line in rows], low, high, color=colour, alpha=0.2, linewidth=0)


def _crosses(ax: Any, lines: list[dict[str, Any]], key: str, over: str, colour: str) -> None:
    """Standard errors of both values: a band would fold back where the one across does."""
    known = [line for line in lines if _finite(line.get(key)) and _finite(line.get(over))]
    ax.errorbar(
        [line[over] for line in known],
        [line[key] for line in known],
        xerr=[line.get(f"{over}_stderr", 0) for line in known],
        yerr=[line.get(f"{key}_stderr", 0) for line in known],
        fmt="none",
        ecolor=colour,
        elinewidth=0.8,
        alpha=0.5,
    )


def _figure(panels: int) -> tuple[Any, list[Any]]:
    # Figure alone, without pyplot: no global state, no display; saving it draws with Agg.
    from matplotlib.figure import Figure

    columns = 1 if panels == 1 else 2
    rows = -(-panels // columns)
    scale = 1.0 if panels == 1 else 0.78
    size = (WIDTH * columns * scale, HEIGHT * rows * scale + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    return figure, axes[:panels]


def _finish(ax: Any, title: str, unit: str, over_unit: str) -> None:
    ax.set_title(title, fontsize=11, color=INK, loc="left")
    ax.set_xlabel(over_unit, fontsize=10, color=INK)
    ax.set_ylabel(unit, fontsize=10, color=INK)
    ax.tick_params(labelsize=9, color=FAINT, labelcolor=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)


def _legend(figure: Any, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()  # outside, where it hides no curve
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    columns = legend_columns(labels, characters=13 * figure.get_figwidth())
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **style)


def legend_columns(labels: list[str], characters: float) -> int:
    """The most columns of a legend whose widest labels fit side by side, each with its handle."""
    for columns in range(len(labels), 1, -1):
        # matplotlib fills column after column, the first ones with one more.
        ends = [-(-len(labels) * (column + 1) // columns) for column in range(columns)]
        starts = [0, *ends[:-1]]
        widest = [max(map(len, labels[a:b])) for a, b in zip(starts, ends, strict=True)]
        if sum(width + 8 for width in widest) <= characters:
            return columns
    return 1


def _sign(figure: Any, run_name: str) -> None:
    """The run's name on its picture."""
    if run_name:
        figure.suptitle(run_name, fontsize=8, color=INK, x=0.99, ha="right")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    return path
