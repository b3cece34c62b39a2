"""The lines of the parts as report.md, a table, and the few files that go back."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

from bench.gpu.notes import read_line
from bench.gpu.plan import PARTS
from bench.gpu.predictions import AS_PREDICTED, Predicted
from bench.peer_results import peers_table
from bench.registry import BENCHMARKS
from bench.text import caption, markdown

LINES, REPORT, LOG = "gpu.jsonl", "report.md", "log.txt"
PROFILE, PLOTS = "profile.json.gz", "plots.tar"
LARGEST = 15 * 2**20  # bytes of a file that goes back
Line = dict[str, Any]


def lines_of(state: Path) -> list[Line]:
    """In the order of the plan."""
    found = [read_line(state, part.name) for part in PARTS]
    return [line for line in found if line is not None]


def one_line(line: Line) -> str:
    reason = f": {line['reason']}" if line["reason"] else ""
    lacks = f" (lacks {', '.join(line['lacks'])})" if line["lacks"] else ""
    return f"{line['part']}: {line['status']} in {line['seconds']:.0f} s{reason}{lacks}"


def collect(state: Path, out: Path) -> None:
    """Everything that goes back, made anew from the state."""
    lines = lines_of(state)
    (out / LINES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / REPORT).write_text(tables(lines) + "\n")
    (out / LOG).write_text(_logs(state)[-LARGEST:])
    profiles = [path for path in state.glob(f"*/{PROFILE}") if path.stat().st_size < LARGEST]
    for path in profiles:
        (out / PROFILE).write_bytes(path.read_bytes())
    pictures = sorted(state.glob("*/*.png"))
    if pictures:
        with tarfile.open(out / PLOTS, "w") as tar:
            for path in pictures:
                tar.add(path, f"{path.parent.name}-{path.name}")


def _logs(state: Path) -> str:
    parts = []
    for part in PARTS:
        path = state / part.name / LOG
        if path.is_file():
            parts.append(f"== {part.name}\n{path.read_text(errors='replace')}\n")
    return "".join(parts)


def summary(lines: list[Line]) -> str:
    """How every part ended."""
    rows = []
    for line in lines:
        predicted = [_verdict(figure) for figure in line["figures"] if "predicted" in figure]
        held = "" if line["dry"] else f"{predicted.count(AS_PREDICTED)} of {len(predicted)}"
        ended = line["status"] + (f": {line['reason']}" if line["reason"] else "")
        rows.append([line["part"], ended.replace("|", "/"), f"{line['seconds']:.0f}", held])
    return markdown(("part", "ended", "seconds", "as predicted"), rows)


def tables(lines: list[Line]) -> str:
    """The report: how every part ended, then its figures beside what was predicted of them."""
    if not lines:
        return "No part has run."
    dry = " Toy sizes on a CPU: no figure here means anything." if lines[0]["dry"] else ""
    parts = [f"# Measured on {lines[0]['device']}.{dry}", summary(lines)]
    for line in lines:
        if line["figures"] or line["checks"] or line["files"]:
            parts += [f"## {line['part']}", caption(line["environment"]), *_details(line)]
    return "\n\n".join(parts)


def _details(line: Line) -> list[str]:
    found = []
    if line["figures"]:
        rows = [_figure_row(figure, line["dry"]) for figure in line["figures"]]
        found.append(markdown(("figure", "measured", "predicted", "so"), rows))
    if line["checks"]:
        rows = [
            [check["what"], "yes" if check["passed"] else "NO", check["detail"].replace("|", "/")]
            for check in line["checks"]
        ]
        found.append(markdown(("holds", "", ""), rows))
    if line["lacks"]:
        found.append("Lacks " + "; ".join(line["lacks"]) + ".")
    return found + _benchmark_tables(line["files"])


def _figure_row(figure: dict[str, Any], dry: bool) -> list[str]:
    measured = f"{figure['value']:g} {figure['unit']}".strip()
    if "predicted" not in figure:
        return [figure["what"], measured, "", ""]
    predicted = Predicted(**figure["predicted"])
    verdict = "" if dry else predicted.verdict(figure["value"])
    return [figure["what"], measured, str(predicted), verdict]


def _verdict(figure: dict[str, Any]) -> str:
    return Predicted(**figure["predicted"]).verdict(figure["value"])


def _benchmark_tables(files: dict[str, Any]) -> list[str]:
    found = []
    for name, content in files.items():
        stem = Path(name).stem
        if stem == "peers":
            found.append(peers_table(content, files["peers_detail.json"]))
        elif stem in BENCHMARKS:
            found += [BENCHMARKS[stem].table(case) for case in content["cases"]]
    return found
