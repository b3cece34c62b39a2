"""`fasttr report RUN...`: one HTML file with everything inside, of one run or of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasttr.files import write_text
from fasttr.metrics.plots import comparison_figures, run_figures
from fasttr.metrics.results import Estimate, estimate
from fasttr.report import html
from fasttr.report.numbers import (
    common_results,
    differences,
    headline,
    verdict,
    with_interval,
)
from fasttr.report.record import Record, differing_settings, read_records

FILE = "report.html"
INTERVALS = (
    "Intervals are 95 %, from the spread over rows; they say nothing of "
    "another seed. Bands in pictures are one standard error."
)


def write_report(folders: Sequence[str | Path], target: str | Path, preface: str = "") -> Path:
    """Write the report of runs to `target`, a text above it. FasttrError where a folder holds no
    run."""
    records = read_records(folders)
    write_text(Path(target), report_page(records, preface))
    return Path(target)


def report_page(records: Sequence[Record], preface: str = "") -> str:
    """The whole page; nothing in it is fetched from elsewhere."""
    names = ", ".join(record.name for record in records)
    body = [html.heading(1, names if len(records) == 1 else f"{len(records)} runs: {names}")]
    if preface:
        body.append(html.preformatted(preface.splitlines(), css_class="drawn"))
    if len(records) > 1:
        body += _comparison(records)
    for record in records:
        inside = "\n".join(_run(record, title=len(records) > 1))
        body.append(f'<section class="run">{inside}</section>' if len(records) > 1 else inside)
    return html.page(f"fasttr: {names}", body)


def _comparison(records: Sequence[Record]) -> Iterator[str]:
    yield html.heading(2, "What differs")
    differing = differing_settings(records)
    if differing:
        names = [record.name for record in records]
        rows = [[name, *map(_value, values)] for name, values in differing.items()]
        yield html.table(["setting", *names], rows)
    else:
        yield html.paragraph("The settings are the same.")
    yield html.heading(2, "What they came to")
    yield _headline_table(records)
    yield from _paired(records)
    yield html.heading(2, "Side by side")
    figures = comparison_figures({record.name: record.lines for record in records})
    yield html.figures({name: one for name, one in figures.items() if name != "comparison"})
    yield from _samples_of_runs(records)


def _headline_table(records: Sequence[Record]) -> str:
    of_runs = [{label: number for number, label in headline(record)} for record in records]
    labels = list(dict.fromkeys(label for found in of_runs for label in found))
    rows = [[label, *(found.get(label, "") for found in of_runs)] for label in labels]
    return html.table(["", *(record.name for record in records)], rows)


def _paired(records: Sequence[Record]) -> Iterator[str]:
    """Differences row by row, to the run that is named first."""
    names = common_results(records)
    if not names:
        yield html.paragraph("The runs were not measured on the same rows: nothing to pair.")
        return
    yield html.heading(3, f"Difference to {records[0].name}, row by row")
    for name in names:
        of_first = records[0].results[name]
        rows = [
            [run, with_interval(own, ".3g"), *_difference_cells(pairs)]
            for run, own, pairs in differences(records, name)
        ]
        yield html.paragraph(f"{of_first.title}, {len(of_first.values):,} rows")
        yield html.table(["", "mean", "difference", ""], rows)
    yield html.paragraph(INTERVALS, soft=True)


def _difference_cells(pairs: Estimate | None) -> list[str]:
    return ["", ""] if pairs is None else [with_interval(pairs), verdict(pairs)]


def _samples_of_runs(records: Sequence[Record]) -> Iterator[str]:
    """The last samples of each run beside each other, where the prompts are the same."""
    last = {
        record.name: list(record.samples())[-1][1] for record in records if any(record.samples())
    }
    prompts = [[one["prompt"] for one in samples] for samples in last.values()]
    if len(last) < 2 or any(one != prompts[0] for one in prompts):
        return
    yield html.heading(2, "Last samples")
    rows = [
        [prompt, *(samples[i]["completion"] for samples in last.values())]
        for i, prompt in enumerate(prompts[0])
    ]
    yield html.table(["prompt", *last], rows, css_class="samples")


def _run(record: Record, title: bool) -> Iterator[str]:
    if title:
        yield html.heading(2, record.name)
    parts = [str(record.folder)]
    if "began" in record.facts:
        parts.append(f"begun {record.facts['began']}")
    if not record.is_finished:
        parts.append("has not come to its end")
    yield html.paragraph(", ".join(parts), soft=True)
    yield html.tiles(headline(record))
    yield html.paragraph(INTERVALS, soft=True)
    for name, results in record.results.items():
        if not name.startswith(("accuracy", "margin")):  # they are among the tiles
            found = estimate(results.values)
            yield html.paragraph(
                f"{results.title}: {with_interval(found, '.4g')}, {found.n:,} rows"
            )
    yield html.figures(run_figures(record.lines, record.name))
    yield from _samples(record)
    if "data" in record.facts:
        yield html.heading(3, "Data")
        said = [[f"{name}:", *lines] for name, lines in record.facts["data"].items()]
        yield html.preformatted(line for lines in said for line in lines)
    yield html.heading(3, "Settings that are not defaults")
    changed = record.changed_settings()
    yield html.table([], [[name, _value(value)] for name, value in changed.items()])
    every = [[name, _value(value)] for name, value in record.settings.items()]
    yield html.folded("All settings", html.table([], every))
    if "environment" in record.facts:
        yield html.heading(3, "Machine and versions")
        yield html.table([], _machine(record))


def _samples(record: Record) -> Iterator[str]:
    """The same prompts before, during and after."""
    found = list(record.samples())
    if not found:
        return
    yield html.heading(3, "Samples of the same prompts")
    steps = [step for step, _ in found]
    shown = found if len(found) <= 4 else [found[0], found[len(found) // 2], found[-1]]
    head = ["prompt", *(f"step {step:,}" for step, _ in shown)]
    rows = [
        [first["prompt"], *(samples[i]["completion"] for _, samples in shown)]
        for i, first in enumerate(found[0][1])
    ]
    yield html.table(head, rows, css_class="samples")
    if len(shown) < len(found):
        yield html.paragraph(f"Sampled at steps {', '.join(map(str, steps))}.", soft=True)


def _machine(record: Record) -> list[list[str]]:
    facts = record.facts
    environment = facts.get("environment", {})
    versions = environment.get("versions", {})
    devices = [one["name"] for one in environment.get("devices", [])]
    rows = [
        ["device", ", ".join(devices) or environment.get("cpu", "")],
        ["processes", facts.get("processes", "")],
        ["parameters", _thousands(facts.get("parameters"))],
        ["trained parameters", _thousands(facts.get("trained_parameters"))],
        ["how rows share a call", facts.get("attention_tier", "")],
        ["commit of fasttr", environment.get("git_commit") or "not from a checkout"],
        ["python", environment.get("python", "")],
        *([name, version] for name, version in versions.items() if version),
    ]
    return [[name, str(value)] for name, value in rows if value != ""]


def _thousands(number: Any) -> str:
    return "" if number is None else f"{number:,}"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
