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
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, PAGES = HERE / "results", (HERE / "README.md", HERE.parent / "README.md")
NAMES = ("peers", "head", "lerp", "step", "overhead")
NOT_MEASURED = "not measured on a GPU yet"
_MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


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


def keep(run: Path) -> list[Path]:
    """Copy the JSON of a run's folder (of one benchmark, or of all) to results/DEVICE."""
    kept = []
    for path in sorted(run.rglob("*.json")):
        if path.stem not in (*NAMES, "peers_detail"):
            continue
        folder = _device_of(json.loads(path.read_text())["environment"])
        # Runs of peers differ by their data: each has a folder of its own.
        place = (
            RESULTS
            / folder
            / (path.parent.name if path.stem.startswith("peers") else "")
            / path.name
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
        kept.append(place)
    return kept


def _device_of(environment: dict[str, Any]) -> str:
    devices = environment["devices"]
    if devices and "--cpu" not in environment["command"]:
        return devices[0]["name"].lower().replace(" ", "-")
    return f"cpu-{environment['cpu_count']}-core"


def regenerate(text: str, results: Path) -> str:
    """`text` with every marked table made anew from `results`."""
    return _MARKED.sub(
        lambda found: found[1] + tables_of(found[2], results) + "\n" + found[3], text
    )


def tables_of(name: str, results: Path) -> str:
    """All results of one benchmark, device by device, each with its caption."""
    if name == "headline":
        return headline_table(results)
    if name not in NAMES:
        raise ValueError(f"bench:{name}: wanted one of {', '.join(NAMES)}")
    parts, on_gpu = [], False
    for path in sorted(results.glob(f"*/**/{name}.json")):
        result = json.loads(path.read_text())
        on_gpu = on_gpu or not path.relative_to(results).parts[0].startswith("cpu")
        parts.append(caption(result["environment"]))
        if name == "peers":
            parts.append(
                peers_table(result, json.loads(path.with_name("peers_detail.json").read_text()))
            )
        else:
            parts += [TABLES[name](case) for case in result["cases"]]
    return "\n\n".join([*parts, *([] if on_gpu else [f"GPU: {NOT_MEASURED}."])])


def caption(environment: dict[str, Any]) -> str:
    devices = environment["devices"]
    machine = (
        devices[0]["name"]
        if devices
        else f"{environment['cpu_count']}-core CPU ({environment['cpu']})"
    )
    known = environment["versions"]
    versions = ", ".join(f"{k} {known[k]}" for k in ("torch", "triton", "trl") if known.get(k))
    commit = (environment["git_commit"] or "no checkout")[:12]
    return (
        f"`{environment['command']}` on {machine}, {environment['threads']} threads, load average "
        f"{environment['load_average']:.1f}, {versions}, commit {commit}, "
        f"{environment['time'][:10]}:"
    )


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _reasons(case: dict[str, Any], columns: int) -> list[list[str]]:
    """Lines of providers without a number: why."""
    reasons = {**{k: f"wrong: {v}" for k, v in case["wrong"].items()}, **case["absent"]}
    return [[name, why.replace("|", "/"), *[""] * (columns - 2)] for name, why in reasons.items()]


def _spread(times: dict[str, float], unit: float, digits: int = 2) -> str:
    values = [times[key] / unit for key in ("median_s", "p20_s", "p80_s")]
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*values, d=digits)


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:,.0f}"


def peers_table(result: dict[str, Any], detail: dict[str, Any]) -> str:
    base = result["providers"].get("trl-default")
    columns = [
        "provider",
        "pairs/s",
        "over trl-default",
        "with tokenising",
        "tokens/s",
        "peak GiB",
        "step, s (p20 to p80)",
        "scoring, s a step",
        "CPU s a step",
        "losses differ by",
    ]
    rows = []
    for name, p in result["providers"].items():
        d = detail["detail"][name]
        ratio = f"{p['pairs_per_second'] / base['pairs_per_second']:.2f}x" if base else ""
        differ = detail["largest_difference"].get(name)
        rows.append(
            [
                name,
                f"{p['pairs_per_second']:.2f}",
                ratio,
                f"{d['pairs_per_second_with_tokenising']:.2f}",
                f"{p['tokens_per_second']:,.0f}",
                f"{p['peak_bytes'] / 2**30:.2f}",
                _spread(d["step"], 1.0),
                f"{d['score_s_per_step']:.2f}",
                f"{d['cpu_s_per_step']:.2f}" if "cpu_s_per_step" in d else "",
                "" if differ is None else f"{differ:.0e}",
            ]
        )
    title = (
        f"{Path(detail['data']).parent.name or detail['data']}: {detail['pairs']} pairs, "
        f"{detail['steps']} steps "
        f"of {detail['pairs_per_step']}"
    )
    return title + "\n\n" + markdown(columns, rows + _reasons(detail, len(columns)))


def headline_table(results: Path) -> str:
    """The few figures of peers that stand on the first page: every data set, speed and memory."""
    rows = []
    for path in sorted(results.glob("*/**/peers.json")):
        providers = json.loads(path.read_text())["providers"]
        detail = json.loads(path.with_name("peers_detail.json").read_text())
        data = Path(detail["data"]).parent.name or detail["data"]
        for name, p in providers.items():
            ratio = p["pairs_per_second"] / providers["trl-default"]["pairs_per_second"]
            rows.append(
                [
                    data,
                    str(detail["pairs_per_step"]),
                    name,
                    f"{p['pairs_per_second']:.2f}",
                    f"{ratio:.2f}x",
                    f"{p['peak_bytes'] / 2**30:.2f}",
                ]
            )
    return markdown(
        ["data", "pairs a step", "trainer", "pairs/s", "over trl-default", "peak GiB"], rows
    )


def head_table(case: dict[str, Any]) -> str:
    columns = [
        "head",
        "ms (p20 to p80)",
        "share of bare products",
        "TFLOP/s",
        "peak MiB",
        "logp, nats",
        "dX",
        "dW",
    ]
    rows = []
    for name, r in sorted(case["providers"].items(), key=lambda item: item[1]["median_s"]):
        e = r["errors"]
        what = (
            name
            if r["objective"] == "preference"
            else f"{name} ({r['objective'].replace('_', ' ')})"
        )
        rows.append(
            [
                what,
                _spread(r, 1e-3),
                f"{r['share_of_bare_products']:.0%}",
                f"{r['tflops']:.3g}",
                _mib(r["peak_bytes"]),
                f"{e['logp_nats']:.1e}" if "logp_nats" in e else "",
                f"{e['d_hidden']:.1e}",
                f"{e['d_weight']:.1e}",
            ]
        )
    title = (
        f"{case['shape']} ({case['vocabulary']} x {case['hidden_size']}), {case['tokens']} tokens, "
        f"{case['inputs']} ({case['entropy']:.1f} nats), {case['dtype']}, "
        f"{'with' if case['reference'] else 'without'} the reference; bare products "
        f"{_spread(case['bare_products'], 1e-3)} ms"
    )
    return title + "\n\n" + markdown(columns, rows + _reasons(case, len(columns)))


def lerp_table(case: dict[str, Any]) -> str:
    columns = ["update", "ms (p20 to p80)", "GB/s", "share of the copy"]
    rows = [
        [name, _spread(r, 1e-3), f"{r['gb_per_s']:.3g}", f"{r['share_of_copy']:.0%}"]
        for name, r in sorted(case["providers"].items(), key=lambda item: item[1]["median_s"])
    ]
    title = (
        f"{case['model']} ({case['parameters'] / 1e6:,.1f} M parameters in {case['tensors']} "
        "tensors), "
        f"{case['case']}; copy {case['copy']['gb_per_s']:.3g} GB/s"
    )
    return title + "\n\n" + markdown(columns, rows + _reasons(case, len(columns)))


def step_table(case: dict[str, Any]) -> str:
    columns = [
        "setting",
        "s a step (p20 to p80)",
        "pairs/s",
        "over the line above",
        "tokens/s",
        "peak MiB",
        "MFU",
    ]
    rows, above = [], None
    for name, r in case["settings"].items():
        gain = "" if above is None else f"{r['pairs_per_second'] / above:.2f}x"
        rows.append(
            [
                name if above is None else f"+ {name}",
                _spread(r, 1.0, 3),
                f"{r['pairs_per_second']:.2f}",
                gain,
                f"{r['tokens_per_second']:,.0f}",
                _mib(r["peak_bytes"]),
                f"{r['mfu']:.1%}" if "mfu" in r else "",
            ]
        )
        above = r["pairs_per_second"]
    title = f"{case['lengths']} lengths, model {case['size']}, "
    title += f"{case['pairs']} pairs ({case['tokens']:,} tokens)"
    return title + "\n\n" + markdown(columns, rows + _reasons(case, len(columns)))


def overhead_table(case: dict[str, Any]) -> str:
    rows = [[name, f"{value:.4g} {unit}"] for name, (value, unit) in case["figures"].items()]
    return case["what"] + "\n\n" + markdown(["figure", "value"], rows + _reasons(case, 2))


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "head": head_table,
    "lerp": lerp_table,
    "step": step_table,
    "overhead": overhead_table,
}
