"""Cells and tables of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return title + "\n\n" + markdown(columns, rows)


def reasons(case: Mapping[str, Any], columns: int) -> list[list[str]]:
    """Lines of providers without a number: why."""
    wrong = {name: f"wrong: {why}" for name, why in case["wrong"].items()}
    lines = {**wrong, **case["absent"]}
    blank = [""] * (columns - 2)
    return [[name, why.replace("|", "/"), *blank] for name, why in lines.items()]


def spread(times: Mapping[str, float], unit: float, digits: int = 2) -> str:
    """`median (20th to 80th percentile)` of times in seconds, in `unit` seconds."""
    median, p20, p80 = (times[key] / unit for key in ("median_s", "p20_s", "p80_s"))
    return f"{median:.{digits}f} ({p20:.{digits}f} to {p80:.{digits}f})"


def mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def by_median(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows, the fastest first."""
    return sorted(rows.items(), key=lambda item: item[1]["median_s"])


def caption(environment: Mapping[str, Any]) -> str:
    """What a figure was made with: command, machine, threads, load, versions, commit, day."""
    known = environment["versions"]
    versions = ", ".join(f"{k} {known[k]}" for k in ("torch", "triton", "trl") if known.get(k))
    return (
        f"`{environment['command']}` on {machine_of(environment)}, {environment['threads']} "
        f"threads, load average {environment['load_average']:.1f}, {versions}, commit "
        f"{commit_of(environment)}, {environment['time'][:10]}:"
    )


def machine_of(environment: Mapping[str, Any]) -> str:
    devices = environment["devices"]
    if devices:
        return devices[0]["name"]
    return f"{environment['cpu_count']}-core CPU ({environment['cpu']})"


def commit_of(environment: Mapping[str, Any]) -> str:
    return (environment["git_commit"] or "no checkout")[:12]
