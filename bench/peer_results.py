"""What the turns of peers add up to: who may print a number, the figures, and their tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.text import markdown, reasons, spread, titled
from bench.timing import Times
from fasttr.toy.stats import interval

# The first of a group that ran is what the others are compared with.
GROUPS = (
    ("trl-default", "trl-best", "trl-patched", "fasttr", "fasttr-compiled"),
    ("trl-sync", "fasttr-soft"),
)
WARM_UP = 2  # steps

Losses = Mapping[str, list[float]]  # provider -> loss of every step, nats


class Verdict(NamedTuple):
    differences: dict[str, float]  # largest, from the first of the group
    wrong: dict[str, str]


def verdicts(losses: Losses, allowed: float) -> Verdict:
    """Who may print a number: the first loss is log 2, and all losses agree within `allowed`."""
    differences = _differences(losses)
    wrong = {}
    for name, found in losses.items():
        if not found or not abs(found[0] - math.log(2)) <= allowed:
            wrong[name] = "the loss of step 1 is not log 2"
    for name, difference in differences.items():
        if not difference <= allowed:
            wrong.setdefault(
                name, f"losses differ by {difference:.2e} at some step; allowed {allowed}"
            )
    return Verdict(differences, wrong)


def _differences(losses: Losses) -> dict[str, float]:
    out = {}
    for group in GROUPS:
        present = [name for name in group if name in losses]
        for name in present[1:]:
            out[name] = _largest_difference(losses[name], losses[present[0]])
    return out


def _largest_difference(a: list[float], b: list[float]) -> float:
    if len(a) != len(b) or not a:
        return math.inf
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    # max() would pass over a NaN.
    return math.inf if any(math.isnan(x) for x in differences) else max(differences)


class Figures(NamedTuple):
    figures: dict[str, Any]  # of peers.json
    detail: dict[str, Any]  # of peers_detail.json


def figures_of(spec: Mapping[str, Any], run: Mapping[str, Any], tokens_per_pair: float) -> Figures:
    """The turns of a provider as rates and memory."""
    steps = [turn for turn in run["turns"] if turn["kind"] == "step"]
    sweeps = [turn for turn in run["turns"] if turn["kind"] == "score"]
    bare = [turn["seconds"] - sum(turn["parts"].values()) for turn in steps]
    warm = min(WARM_UP, len(bare) - 1)
    times = Times.of(bare[warm:])
    scoring = sum(turn["seconds"] for turn in sweeps)
    scoring += sum(turn["parts"].get("score", 0.0) for turn in steps)
    moving = sum(turn["parts"].get("move", 0.0) for turn in steps)
    # A fixed reference is swept once; a step of a later epoch finds its log-probs there.
    per_step = times.median + (scoring + moving) / len(steps)
    rate = spec["batch"] / per_step
    tokenise = run["tokenise_seconds"] / spec["rows"]
    figures = {
        "settings": _stated(spec),
        "pairs_per_second": rate,
        "tokens_per_second": rate * tokens_per_pair,
        "peak_bytes": max(turn["peak_bytes"] for turn in run["turns"]),
        "losses": run["losses"],
    }
    detail = {
        "step": times.as_dict(),
        "warm_up_steps": warm,
        "step_seconds": bare,
        "score_s_per_step": scoring / len(steps),
        "move_s_per_step": moving / len(steps),
        "tokenise_s_per_pair": tokenise,
        "cpu_s_per_step": _processor_seconds(steps, sweeps, warm),
        "pairs_per_second_with_tokenising": 1 / (1 / rate + tokenise),
    }
    return Figures(figures, detail)


def _processor_seconds(steps: list[dict], sweeps: list[dict], warm: int) -> float:
    """All of a step's processor time, its share of sweeps and moves included: what a loaded machine
    does not stretch."""
    measured = steps[warm:]
    of_steps = sum(turn["cpu_seconds"] for turn in measured) / len(measured)
    return of_steps + sum(turn["cpu_seconds"] for turn in sweeps) / len(steps)


def _stated(spec: Mapping[str, Any]) -> dict[str, Any]:
    # Together they are the fp32 weights that steps are made on.
    split = spec["bf16"] and spec["trainer"] == "fasttr"
    common = {
        "pairs_per_step": spec["batch"],
        "weights": "bfloat16 + int16" if split else "float32",
        "compute": "bfloat16" if spec["bf16"] else "float32",
        "optimizer": "adamw_torch_fused",
        "reference": "live" if spec["trainer"] == "trl" else "scored ahead",
    }
    keys = ("learning_rate", "adam_epsilon", "beta", "max_length", "seed", "device", "threads")
    return common | {key: spec[key] for key in keys} | spec["settings"]


COLUMNS = (
    "provider",
    "pairs/s",
    "over trl-default",
    "with tokenising",
    "tokens/s",
    "peak GiB",
    "step, s (p20 to p80)",
    "scoring, s a step",
    "CPU s a step",
    "over trl-default by it",
    "losses differ by",
)


def peers_table(result: Mapping[str, Any], detail: Mapping[str, Any]) -> str:
    rows = []
    for name, figures in result["providers"].items():
        own = detail["detail"][name]
        differ = detail["largest_difference"].get(name)
        rows.append(
            [
                name,
                f"{figures['pairs_per_second']:.2f}",
                _over_default(result["providers"], name),
                f"{own['pairs_per_second_with_tokenising']:.2f}",
                f"{figures['tokens_per_second']:,.0f}",
                f"{figures['peak_bytes'] / 2**30:.2f}",
                spread(own["step"], 1.0),
                f"{own['score_s_per_step']:.2f}",
                f"{own['cpu_s_per_step']:.2f}",
                _over_default_by_work(detail["detail"], name),
                "" if differ is None else f"{differ:.0e}",
            ]
        )
    title = (
        f"{data_name(detail)}: {detail['pairs']} pairs, {detail['steps']} steps of "
        f"{detail['pairs_per_step']}"
    )
    return titled(title, COLUMNS, rows + reasons(detail, len(COLUMNS)))


def _over_default(providers: Mapping[str, Any], name: str) -> str:
    base = providers.get("trl-default")
    if base is None:
        return ""
    return f"{providers[name]['pairs_per_second'] / base['pairs_per_second']:.2f}x"


def _over_default_by_work(detail: Mapping[str, Any], name: str) -> str:
    """By processor time: what a loaded machine stretches less."""
    base = detail.get("trl-default")
    if base is None:
        return ""
    return f"{base['cpu_s_per_step'] / detail[name]['cpu_s_per_step']:.2f}x"


def data_name(detail: Mapping[str, Any]) -> str:
    return Path(detail["data"]).parent.name or detail["data"]


def headline_table(results: Path) -> str:
    """The few figures of peers that stand on the first page: every data set, speed and memory."""
    rows = []
    for path in sorted(results.glob("*/**/peers.json")):
        providers = json.loads(path.read_text())["providers"]
        detail = json.loads(path.with_name("peers_detail.json").read_text())
        for name, figures in providers.items():
            rows.append(
                [
                    data_name(detail),
                    str(detail["pairs_per_step"]),
                    name,
                    _over_best(detail["detail"], name),
                    _over_default(providers, name),
                    f"{figures['pairs_per_second']:.2f}",
                    f"{figures['peak_bytes'] / 2**30:.2f}",
                ]
            )
    columns = (
        "data",
        "pairs a step",
        "trainer",
        "over trl-best (95 %)",
        "over trl-default",
        "pairs/s",
        "peak GiB",
    )
    return markdown(columns, rows)


LEAST_STEPS = 5  # measured ones, below which an interval says nothing


def _over_best(detail: Mapping[str, Any], name: str) -> str:
    """The ratio of a step's time to trl-best's: the geometric mean over steps, which take turns on
    the same pairs, with Student's interval where there are enough."""
    best = detail.get("trl-best")
    if best is None:
        return ""
    logs = [math.log(a / b) for a, b in zip(_times(best), _times(detail[name]), strict=True)]
    found = interval(logs)
    ratio = f"{math.exp(found.mean):.2f}x"
    if name == "trl-best" or found.n < LEAST_STEPS:
        return ratio
    return f"{ratio} ({math.exp(found.low):.2f} to {math.exp(found.high):.2f})"


def _times(own: Mapping[str, Any]) -> list[float]:
    """Seconds of each measured step, with its share of scoring and moving the reference."""
    share = own["score_s_per_step"] + own["move_s_per_step"]
    return [seconds + share for seconds in own["step_seconds"][own["warm_up_steps"] :]]
