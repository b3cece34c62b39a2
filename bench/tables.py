"""Tables for people from the JSON of runs, and the README that cites them.

    python -m bench tables                   # write the tables of both READMEs from bench/results
    python -m bench tables --keep runs/bench # first keep the results of a run there

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; bench/results/DEVICE/ holds what
it shows.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import model
from bench.gpu import report as gpu_report
from bench.peer_results import headline_table, peers_table
from bench.registry import BENCHMARKS
from bench.text import caption
from fasttr.files import write_json

HERE = Path(__file__).resolve().parent
RESULTS, PAGES = HERE / "results", (HERE / "README.md", HERE.parent / "README.md")
NOT_MEASURED = "not measured on a GPU yet"
PEERS = "peers"
NAMES = (PEERS, *BENCHMARKS)
WITHOUT_DEVICE = ("scale",)  # what no GPU would change
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", type=Path, help="folder of a run whose JSON goes to bench/results/DEVICE first"
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when a table differs"
    )


def main(args: argparse.Namespace) -> None:
    if args.keep:
        for path in keep(args.keep):
            print(f"kept {path.relative_to(HERE)}")
    for page in PAGES:
        text = page.read_text()
        new = regenerate(text, RESULTS)
        if args.check and new != text:
            raise SystemExit(
                f"the tables of {page} differ from bench/results: run python -m bench tables"
            )
        page.write_text(new)


class Result(NamedTuple):
    """One JSON of a run, and the folder it lay in."""

    name: str
    folder: str
    content: dict[str, Any]


def keep(run: Path) -> list[Path]:
    """Copy the JSON of a run's folder (of one benchmark, of all, or of a GPU plan) to
    results/DEVICE."""
    kept = []
    for result in _results_of(run):
        device = _device_of(result.content["environment"])
        # Runs of peers differ by their data: each has a folder of its own.
        folder = result.folder if result.name.startswith(PEERS) else ""
        place = RESULTS / device / folder / f"{result.name}.json"
        write_json(place, result.content)
        kept.append(place)
    return kept


def _results_of(run: Path) -> Iterator[Result]:
    wanted = (*NAMES, "peers_detail")
    for path in sorted(run.rglob("*.json")):
        if path.stem in wanted:
            yield Result(path.stem, path.parent.name, json.loads(path.read_text()))
    # The lines of a plan hold the JSON of the benchmarks that its parts ran.
    for path in sorted(run.rglob("gpu.jsonl")):
        parts = [json.loads(line) for line in path.read_text().splitlines()]
        yield Result("gpu", "", {"environment": parts[0]["environment"], "parts": parts})
        for part in parts:
            for name, content in part["files"].items():
                if Path(name).stem in wanted:
                    yield Result(Path(name).stem, part["part"], content)


def _device_of(environment: dict[str, Any]) -> str:
    devices = environment["devices"]
    if devices and "--cpu" not in environment["command"]:
        return devices[0]["name"].lower().replace(" ", "-")
    return f"cpu-{environment['cpu_count']}-core"


def regenerate(text: str, results: Path) -> str:
    """`text` with every marked table made anew from `results`."""
    return MARKED.sub(lambda found: found[1] + tables_of(found[2], results) + "\n" + found[3], text)


def tables_of(name: str, results: Path) -> str:
    """All results of one benchmark, device by device, each with its caption."""
    if name == "headline":
        return headline_table(results)
    if name == "model":
        return model.tables()
    if name == "gpu":
        return _gpu_tables(results)
    if name not in NAMES:
        raise ValueError(f"bench:{name}: wanted one of {', '.join(NAMES)}")
    parts = []
    is_on_gpu = False
    for path in sorted(results.glob(f"*/**/{name}.json")):
        device = path.relative_to(results).parts[0]
        is_on_gpu = is_on_gpu or not device.startswith("cpu")
        parts += [caption(_read(path)["environment"]), *_tables_in(path)]
    if not is_on_gpu and name not in WITHOUT_DEVICE:
        parts.append(f"GPU: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def _tables_in(path: Path) -> list[str]:
    result = _read(path)
    if path.stem == PEERS:
        return [peers_table(result, _read(path.with_name("peers_detail.json")))]
    return [BENCHMARKS[path.stem].table(case) for case in result["cases"]]


def _gpu_tables(results: Path) -> str:
    paths = sorted(results.glob("*/gpu.json"))
    if not paths:
        return f"GPU: {NOT_MEASURED}."
    return "\n\n".join(gpu_report.tables(_read(path)["parts"]) for path in paths)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
