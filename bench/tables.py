"""Tables for people, from the JSON of a run."""

from __future__ import annotations

from typing import Any


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peers_table(result: dict[str, Any], detail: dict[str, Any]) -> str:
    rows = []
    base = result["providers"].get("trl-default")
    for name, p in result["providers"].items():
        d = detail["detail"][name]
        ratio = f"{p['pairs_per_second'] / base['pairs_per_second']:.2f}x" if base else ""
        step = d["step"]
        rows.append([
            name, f"{p['pairs_per_second']:.2f}", ratio, f"{d['pairs_per_second_with_tokenising']:.2f}",
            f"{p['tokens_per_second']:,.0f}", f"{p['peak_bytes'] / 2**30:.2f}",
            f"{step['median_s']:.2f} ({step['p20_s']:.2f} to {step['p80_s']:.2f})", f"{d['score_s_per_step']:.2f}",
            f"{detail['largest_difference'].get(name, 0):.1e}",
        ])  # fmt: skip
    rows += [[name, why] + [""] * 7 for name, why in {**detail["wrong"], **detail["absent"]}.items()]
    return markdown(
        ["provider", "pairs/s", "over trl-default", "with tokenising", "tokens/s", "peak GiB", "step, s (p20 to p80)",
         "scoring, s a step", "loss differs by"], rows,
    )  # fmt: skip
