"""`python -m bench.paper.ocrm_toy`: what weighting a reward model's pairs by density ratios does,
where everything but the labels is exact.

Every number is a mean over seeds of labels with its standard deviation. Written into DIR: table.md,
verdict.md, results.json and ocrm-toy.png. No language model, no sampling of policies: see
`fasttr.toy.exact` for what the toy is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fasttr.losses.ratios import RELEASE, RatioSettings, pair_weights
from fasttr.toy.exact import (
    ARMS,
    GOLDS,
    SFT_LOGP,
    Settings,
    Stage,
    best_single_stage,
    draw_pairs,
    fit_reward,
    loss_under,
    run,
)
from fasttr.toy.exact_plot import plot_stages
from fasttr.toy.stats import Interval, interval, words

MIDDLE = 8  # the stage whose policy the reward models are compared on
CONTROLS = {
    "exponent 0.001, as released": Settings(stages=12, ratios=RELEASE),
    "exponent 0.5": Settings(stages=12, ratios=RatioSettings(tau=0.5, min_ess=0.0)),
    "exponent 1": Settings(stages=12),
    "exponent 1, reference stays at SFT": Settings(stages=12, resets_reference=False),
    "exponent 1, 30 stages": Settings(stages=30),
}


class Found(NamedTuple):
    """One gold reward over seeds."""

    sft: float
    runs: dict[str, list[list[Stage]]]  # arm -> seeds -> stages
    oracle: list[float]  # by seed: one reward model, beta chosen by gold
    excess: list[tuple[float, float]]  # by seed: unweighted, weighted fit, under the middle policy
    accuracy: list[tuple[float, float]]

    def final(self, arm: str) -> list[float]:
        return [stages[-1].gold for stages in self.runs[arm]]

    def over_oracle(self, arm: str) -> Interval:
        pairs = zip(self.final(arm), self.oracle, strict=True)
        return interval(a - b for a, b in pairs)


def study(gold: str, seeds: int) -> Found:
    settings = Settings(gold=gold)
    runs = {arm: [run(arm, seed, settings) for seed in range(seeds)] for arm in ARMS}
    values = GOLDS[gold]
    oracle, excess, accuracy = [], [], []
    for seed in range(seeds):
        oracle.append(best_single_stage(runs["fixed"][seed][0].theta, values))
        policy = runs["weighted"][seed][MIDDLE - 1].logp
        pairs = draw_pairs(np.random.default_rng(seed), SFT_LOGP, values, settings.pairs)
        found = pair_weights(policy[pairs], SFT_LOGP[pairs], settings.ratios)
        fits = (fit_reward(pairs, np.ones(len(pairs))), fit_reward(pairs, found.weights))
        plain, weighted = (loss_under(policy, theta, values) for theta in fits)
        excess.append((plain.excess, weighted.excess))
        accuracy.append((plain.accuracy, weighted.accuracy))
    sft = float(np.exp(SFT_LOGP) @ values)
    return Found(sft, runs, oracle, excess, accuracy)


def table(found: dict[str, Found]) -> str:
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    cells = {
        "SFT policy": [f"{one.sft:.2f}" for one in found.values()],
        "one reward model, best beta by gold": [_spread(one.oracle) for one in found.values()],
    }
    names = {
        "fixed": "one reward model, 15 stages",
        "weighted": "**refitted with density ratios**",
        "shuffled": "refitted with shuffled ratios",
        "fresh": "refitted on new labels (the bound)",
    }
    for arm, name in names.items():
        cells[name] = [_spread(one.final(arm)) for one in found.values()]
    cells["seeds in which weighting beats the best beta; least margin"] = [
        _beaten(one) for one in found.values()
    ]
    cells[f"excess loss under policy {MIDDLE}: unweighted, weighted fit"] = [
        _two(one.excess) for one in found.values()
    ]
    cells[f"accuracy under policy {MIDDLE}: unweighted, weighted fit"] = [
        _two(one.accuracy) for one in found.values()
    ]
    cells["KL to SFT at the end, weighted (nats a text)"] = [
        _spread([stages[-1].kl for stages in one.runs["weighted"]]) for one in found.values()
    ]
    cells["effective pairs of 20,000 at the end, weighted"] = [
        f"{np.mean([stages[-1].effective_size for stages in one.runs['weighted']]):.0f}"
        for one in found.values()
    ]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())])


def control_table(seeds: int) -> str:
    """Saturating gold: the weighted arm under other settings, and the fixed one beside it."""
    rows = ["| saturating, weighted | gold | effective pairs |", "|---|---|---|"]
    fixed = [run("fixed", seed, Settings(stages=12))[-1].gold for seed in range(seeds)]
    rows.append(f"| for comparison: one reward model, 12 stages | {_spread(fixed)} | |")
    for name, settings in CONTROLS.items():
        ends = [run("weighted", seed, settings)[-1] for seed in range(seeds)]
        size = np.mean([stage.effective_size for stage in ends])
        rows.append(f"| {name} | {_spread([s.gold for s in ends])} | {size:.0f} |")
    return "\n".join(rows)


def verdict(found: dict[str, Found]) -> list[str]:
    """Sentences that the intervals over seeds allow."""
    lines = []
    for gold, one in found.items():
        said = words(
            one.over_oracle("weighted"),
            "more gold reward than one reward model at its best beta",
            "less gold reward than one reward model at its best beta",
            "no difference from one reward model at its best beta is shown",
        )
        lines.append(f"{gold}: weighted: {said}")
        dealt = interval(
            a - b for a, b in zip(one.final("shuffled"), one.final("fixed"), strict=True)
        )
        said = words(
            dealt,
            "more gold reward than one reward model run on",
            "less gold reward than one reward model run on",
            "no difference from one reward model run on is shown",
        )
        lines.append(f"{gold}: shuffled: {said}")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.ocrm_toy", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/paper/ocrm_toy"))
    asked = parser.parse_args(argv)
    began = time.perf_counter()
    found = {gold: study(gold, asked.seeds) for gold in GOLDS}
    text = f"{table(found)}\n\n{control_table(asked.seeds)}\n"
    said = [f"- {line}" for line in verdict(found)]
    seconds = time.perf_counter() - began
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "table.md").write_text(text)
    (asked.out / "verdict.md").write_text("\n".join(said) + "\n")
    document = {
        "seeds": asked.seeds,
        "seconds": seconds,
        "final_gold": {
            gold: {arm: one.final(arm) for arm in ARMS} | {"oracle": one.oracle}
            for gold, one in found.items()
        },
    }
    (asked.out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    panels = {gold: one.runs for gold, one in found.items()}
    plot_stages(panels, {g: one.sft for g, one in found.items()}, asked.out / "ocrm-toy.png")
    print(text)
    print("\n".join(said))
    print(f"{asked.seeds} seeds in {seconds:.0f} s; all in {asked.out}")


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} +- {np.std(values):.2f}"


def _beaten(one: Found) -> str:
    margins = np.array(one.final("weighted")) - np.array(one.oracle)
    return f"{(margins > 0).sum()}/{len(margins)}; {margins.min():+.2f}"


def _two(values: list[tuple[float, float]]) -> str:
    plain, weighted = np.mean(values, axis=0)
    return f"{plain:.3f}, {weighted:.3f}"


if __name__ == "__main__":
    main()
