"""The study's results: JSON, tables, a verdict in words, pictures."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.paper.when.design import FACTORS, SEEDS, settings_of
from bench.paper.when.effects import (
    KL,
    MISS,
    OUTCOMES,
    PRIMARY,
    Effect,
    Outcome,
    against_controls,
    cells,
    effects,
    levels,
)
from bench.paper.when.plots import plot_effects, plot_paths, readable
from bench.paper.when.runs import ARMS, CONTROLS, MOVING, Scale
from bench.paper.when.study import Record
from fasttr.files import write_json, write_text

Found = Mapping[tuple[str, str], Effect]
ENDS = {
    "gold": 3,
    "kl": 2,
    "outside": 3,
    "length": 1,
    "chosen": 2,
    "rejected": 2,
    "accuracy": 3,
}  # column -> digits

NOT_SHOWN = "not shown to differ"
SECTION = "section.md"  # what stands in the studies' page


def write(records: Sequence[Record], scale: Scale, out: Path) -> str:
    """Everything, into `out`; returns the verdict. Without a complete seed there is nothing."""
    if not records:
        return "no seed is complete: nothing to report"
    found = {outcome: effects(records, outcome) for outcome in OUTCOMES}
    controls = against_controls(records)
    said = "\n".join(f"- {line}" for line in verdict(found, controls)) + "\n"
    (out / "verdict.md").write_text(said)
    tables = [effect_table(found[PRIMARY]), control_table(controls), end_table(records)]
    (out / "table.md").write_text("\n\n".join(tables) + "\n")
    (out / SECTION).write_text(section(records, found, controls) + "\n")
    write_json(
        out / "results.json",
        {
            "scale": scale._asdict(),
            "torch": torch.__version__,
            "effects": {outcome.name: _listed(of) for outcome, of in found.items()},
            "controls": _listed(controls),
            "columns": list(records[0].rows[0]),
            "runs": [_compact(record) for record in records],
        },
    )
    plot_paths(records, out / "paths.png")
    plot_effects(found, out / "effects.png")
    return said


def publish(out: Path, paper: Path) -> None:
    """Put what `write` left in `out` into the folder of the studies' page, and the seeds and the
    tables into the page."""
    for name in ("table.md", "verdict.md", "results.json"):
        shutil.copy(out / name, paper / "when" / name)
    for name in ("paths.png", "effects.png"):
        shutil.copy(out / name, paper / f"when-{name}")
    page = paper / "README.md"
    before, rest = page.read_text().split("<!-- when -->\n")
    _, after = rest.split("<!-- /when -->\n")
    block = f"<!-- when -->\n{(out / SECTION).read_text()}<!-- /when -->\n"
    write_text(page, before + block + after)


def section(records: Sequence[Record], found: Mapping[Outcome, Found], controls: Found) -> str:
    """How far the study is, what it says, and two tables."""
    seeds = len({record.seed for record in records})
    planned = SEEDS * len(settings_of(0)) * len(ARMS)
    places = len(levels()) - 1 + len(cells())
    return "\n\n".join(
        [
            f"**{seeds} of the {SEEDS} planned seeds are complete, {len(records)} of {planned} "
            "runs.** Where a moving reference helps, hurts, or is not shown to differ from the "
            "fixed one in the same setting: over all settings, and in brackets in how many of the "
            f"{places} levels and cells of the picture.",
            word_table(found),
            f"The {PRIMARY.name}, a moving reference less the fixed one; bold: the interval leaves "
            f"zero out. The intervals hold together at {1 - MISS:.0%} (largest |t| of a family "
            "under changes of sign by seed; the writer x part cells are a family of their own).",
            effect_table(found[PRIMARY]),
            "The same outcome, over all settings, less each control:",
            control_table(controls),
        ]
    )


def word_table(found: Mapping[Outcome, Found]) -> str:
    """A line an outcome that has a good sign, a column a moving reference."""
    lines = ["| | " + " | ".join(MOVING) + " |", "|---|" + "---|" * len(MOVING)]
    for outcome, of in found.items():
        if outcome.good:
            shown = [_counted(arm, of, outcome) for arm in MOVING]
            lines.append(f"| {outcome.name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _counted(arm: str, of: Found, outcome: Outcome) -> str:
    """The word over all settings, and at how many levels and in how many cells there is one."""
    places = [name for name in (*levels(), *cells()) if name != "all"]
    said = Counter(word(of[arm, name], outcome) for name in places)
    everywhere = word(of[arm, "all"], outcome)
    counts = ", ".join(f"{one} in {said[one]}" for one in ("helps", "hurts") if said[one])
    return f"{everywhere} ({counts.removeprefix(everywhere).strip()})" if counts else everywhere


def _listed(found: Found) -> dict[str, list[float | None]]:
    """Mean, ends of the interval (null where there is none) and number of seeds."""
    listed: dict[str, list[float | None]] = {}
    for (arm, level), effect in found.items():
        numbers = [round(x, 5) if math.isfinite(x) else None for x in effect[:3]]
        listed[f"{arm} | {level}"] = [*numbers, effect.seeds]
    return listed


def _compact(record: Record) -> dict[str, Any]:
    """One line of numbers a measurement, in the order of `columns`."""
    rows = [" ".join(f"{value:.4g}" for value in row.values()) for row in record.rows]
    return {"seed": record.seed, "setting": record.setting, "arm": record.arm, "rows": rows}


def word(effect: Effect, outcome: Outcome) -> str:
    """The rule: what an interval that leaves zero out says."""
    if outcome.good == 0:
        return {1: "higher", -1: "lower", 0: NOT_SHOWN}[effect.sign]
    return {1: "helps", -1: "hurts", 0: NOT_SHOWN}[effect.sign * outcome.good]


def verdict(found: Mapping[Outcome, Found], controls: Found) -> list[str]:
    """Words for each outcome and moving reference, then for the controls."""
    lines = []
    for outcome, of in found.items():
        lines += [f"{outcome.name}: {_of_arm(arm, of, outcome)}" for arm in MOVING]
    for arm in MOVING:
        compared = [
            f"{_than(controls[arm, control])} {control} ({controls[arm, control].text()})"
            for control in CONTROLS
        ]
        lines.append(f"{PRIMARY.name}: {arm}: " + "; ".join(compared))
    for control in CONTROLS:
        effect = controls[control, "fixed"]
        lines.append(f"{PRIMARY.name}: {control}: {_than(effect)} fixed ({effect.text()})")
    lines.append(f"arms are told apart best, by their KL after the same steps: {apart(found[KL])}")
    seeds = max(effect.seeds for effect in found[PRIMARY].values())
    lines.append(
        f"intervals: {seeds} seeds; those of one outcome, and those against the controls, hold "
        f"together at {1 - MISS:.0%} (largest |t| of a family under changes of sign by seed); a "
        "word is said where the interval leaves zero out, and what is not named is not shown to "
        "differ"
    )
    return lines


def apart(found: Found) -> str:
    """The writer and part where moving references differ most from the fixed one, in units of half
    an interval, mean over them. It says nothing of which is better."""

    def distance(cell: str) -> float:
        of = [found[arm, cell] for arm in MOVING]
        half = [max(effect.high - effect.mean, 1e-9) for effect in of]
        return float(np.mean(np.abs([effect.mean for effect in of]) / half))

    furthest = max(cells(), key=distance)
    return furthest if distance(furthest) > 0 else "too few seeds to say"


def _of_arm(arm: str, of: Found, outcome: Outcome) -> str:
    """What is shown over all settings, and at which levels and in which cells."""
    by_word: dict[str, list[str]] = {}
    for level in (*levels(), *cells()):
        by_word.setdefault(word(of[arm, level], outcome), []).append(readable(level))
    everywhere = of[arm, "all"]
    shown = [f"{said}: {', '.join(by_word[said])}" for said in sorted(by_word) if said != NOT_SHOWN]
    return f"**{arm}: {word(everywhere, outcome)}** ({everywhere.text()})" + "".join(
        f"; {part}" for part in shown or ["nor in any level or cell"]
    )


def _than(effect: Effect) -> str:
    return {1: "more than", -1: "less than", 0: f"{NOT_SHOWN} from"}[effect.sign]


def effect_table(found: Found) -> str:
    """A line a level, a column a moving reference; bold where the interval leaves zero out."""
    lines = ["| | " + " | ".join(MOVING) + " |", "|---|" + "---|" * len(MOVING)]
    for level in (*levels(), *cells()):
        shown = [_bold(found[arm, level]) for arm in MOVING]
        lines.append(f"| {readable(level)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def control_table(controls: Found) -> str:
    lines = ["| less | " + " | ".join(CONTROLS) + " |", "|---|" + "---|" * len(CONTROLS)]
    for arm in MOVING:
        shown = [_bold(controls[arm, control]) for control in CONTROLS]
        lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    shown = [_bold(controls[control, "fixed"].negated()) for control in CONTROLS]
    lines.append("| fixed | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _bold(effect: Effect) -> str:
    return f"**{effect.text()}**" if effect.sign else effect.text()


def end_table(records: Sequence[Record]) -> str:
    """Means over a writer's settings after the last step, gold reward with its standard error."""
    lines = ["| writer | arm | " + " | ".join(ENDS) + " |", "|---|---|" + "---|" * len(ENDS)]
    for writer in FACTORS["writer"]:
        for arm in ARMS:
            here = [r for r in records if r.setting.writer == writer and r.arm == arm]
            if not here:
                continue
            ends = {key: np.array([record.rows[-1][key] for record in here]) for key in ENDS}
            shown = [f"{ends[key].mean():.{digits}f}" for key, digits in ENDS.items()]
            if len(here) > 1:
                shown[0] += f" +- {ends['gold'].std(ddof=1) / len(here) ** 0.5:.3f}"
            lines.append(f"| {writer} | {arm} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
