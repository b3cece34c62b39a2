"""What the study of `bench.paper.ocrm_lm` found: a table, a picture, and the sentences that the
intervals over seeds allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fasttr.metrics.plots import BLUE, DPI, FAINT, GREEN, INK, ORANGE, PURPLE
from fasttr.toy.stats import Interval, interval, words

Line = dict[str, Any]
Found = dict[str, dict[int, list[Line]]]  # arm -> seed -> stages, as `run_ocrm` returns them

COLOURS = {"fixed": BLUE, "weighted": GREEN, "shuffled": ORANGE, "fresh": PURPLE}
MARKERS = {"fixed@sft": "x", "weighted@sft": "*", "unweighted@sft": "+"}
CONTROLS = ("reward", "reward_1", "shuffled", "unweighted")


def ends(found: Found, arm: str, name: str = "gold") -> dict[int, float]:
    """Of each seed, the last stage's value."""
    return {seed: lines[-1][name] for seed, lines in found[arm].items() if name in lines[-1]}


def best(found: Found, arm: str) -> dict[int, float]:
    """Of each seed, the largest gold reward of a stage, which nobody finds without gold labels."""
    return {seed: max(line["gold"] for line in lines) for seed, lines in found[arm].items()}


def worst(found: Found, arm: str) -> dict[int, float]:
    """Of each seed, the least gold reward of a stage."""
    return {seed: min(line["gold"] for line in lines) for seed, lines in found[arm].items()}


def by_prompts(found: Found, arm: str) -> tuple[int, int]:
    """Seeds in which the arm ends above, and below, the first one by more than 1.96 standard errors
    of the difference over the same prompts."""
    difference = ends(found, arm, "gold_difference")
    stderr = ends(found, arm, "gold_difference_stderr")
    above = sum(x > 1.96 * stderr[seed] for seed, x in difference.items())
    return above, sum(x < -1.96 * stderr[seed] for seed, x in difference.items())


def paired(mine: dict[int, float], others: dict[int, float]) -> Interval:
    return interval(mine[seed] - others[seed] for seed in mine if seed in others)


def table(found: Found) -> str:
    """A line an arm: means over seeds, and differences to the first arm, paired by seed."""
    first = next(iter(found))
    lines = [
        "| arm | seeds | episodes | labels | gold at the end | beside "
        f"{first} [95 %] | seeds above, below it | best, worst stage | KL at the end | length | "
        "effective pairs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in found.items():
        gold, ess = ends(found, arm), ends(found, arm, "ess")
        cells = [
            arm,
            str(len(seeds)),
            f"{_mean(ends(found, arm, 'episodes')):.0f}",
            f"{_mean(ends(found, arm, 'labels')):.0f}",
            _with_spread(list(gold.values())),
            "" if arm == first else paired(gold, ends(found, first)).text(),
            "" if arm == first else "{}, {}".format(*by_prompts(found, arm)),
            f"{_mean(best(found, arm)):.3f}, {_mean(worst(found, arm)):.3f}",
            f"{_mean(ends(found, arm, 'kl')):.2f}",
            f"{_mean(ends(found, arm, 'length')):.1f}",
            f"{_mean(ess):.0f}" if ess else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_tests_of_weights(found)])


def _tests_of_weights(found: Found) -> list[str]:
    """What the reward models of the weighted arm make of its own policies' samples, over all
    stages with ratios."""
    told: list[str] = []
    seen: list[dict[int, float]] = []
    for name in CONTROLS:
        values = _over_stages(found, f"{name}/excess_loss")
        if values and values not in seen:  # a refit may be the same fit
            told.append(name)
            seen.append(values)
    if not told:
        return []
    names = {"reward": "weighted", "reward_1": "the first one", "shuffled": "shuffled weights"}
    lines = ["| fit, on the weighted arm's samples | excess loss | accuracy |", "|---|---|---|"]
    for name in told:
        excess, accuracy = (
            interval(_over_stages(found, f"{name}/{what}").values())
            for what in ("excess_loss", "accuracy")
        )
        lines.append(f"| {names.get(name, name)} | {excess.text()} | {accuracy.text()} |")
    return lines


def _over_stages(found: Found, name: str) -> dict[int, float]:
    """Of each seed, the mean over the weighted arm's stages from the second on."""
    values = {}
    for seed, lines in found.get("weighted", {}).items():
        of_seed = [line[name] for line in lines if line["stage"] > 1 and name in line]
        if of_seed:
            values[seed] = float(np.mean(of_seed))
    return values


def verdict(found: Found) -> list[str]:
    """Sentences that the intervals allow; each stands by itself."""
    lines = []
    for arm in [arm for arm in found if arm != "fixed"]:
        against = {"one reward model at the end": ends(found, "fixed")}
        if arm != "fixed@sft":
            against["the best stage of one reward model"] = best(found, "fixed")
        if arm == "weighted" and "shuffled" in found:
            against["the same weights shuffled"] = ends(found, "shuffled")
            against["new labels"] = ends(found, "fresh")
        for name, others in against.items():
            said = words(
                paired(ends(found, arm), others),
                f"more gold reward than {name}",
                f"less gold reward than {name}",
                f"no difference from {name} is shown",
            )
            lines.append(f"{arm}: {said}")
    for name in ("reward_1", "shuffled"):
        mine, others = (_over_stages(found, f"{x}/excess_loss") for x in ("reward", name))
        if mine and others:
            other = {"reward_1": "the unweighted one", "shuffled": "shuffled weights"}[name]
            said = words(
                paired(mine, others),
                f"a larger loss than {other}",
                f"a smaller loss than {other}",
                f"no difference from {other} is shown",
            )
            lines.append(f"the weighted fit, on its policy's own samples: {said}")
    return lines


def plot(found: Found, path: Path) -> None:
    """Gold reward by stage, and by KL; thin lines are seeds, thick ones their means; baselines are
    points at their end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.8), dpi=DPI, layout="constrained")
    by_stage, by_kl = figure.subplots(1, 2, sharey=True)
    for arm, seeds in found.items():
        if arm not in COLOURS:
            marker = MARKERS.get(arm, f"${arm[0]}$")
            kl, gold = _mean(ends(found, arm, "kl")), _mean(ends(found, arm))
            by_kl.plot(kl, gold, marker=marker, ls="", markersize=7, color=INK, label=arm)
            continue
        runs = [[(line["stage"], line["kl"], line["gold"]) for line in x] for x in seeds.values()]
        shortest = min(map(len, runs))
        mean = np.mean([one[:shortest] for one in runs], axis=0)
        for one in runs:
            by_stage.plot(*np.array(one)[:, [0, 2]].T, color=COLOURS[arm], lw=0.5, alpha=0.4)
        by_stage.plot(mean[:, 0], mean[:, 2], color=COLOURS[arm], lw=1.8, label=arm)
        by_kl.plot(mean[:, 1], mean[:, 2], color=COLOURS[arm], lw=1.8, marker=".")
    by_stage.set_xlabel("stage", fontsize=9, color=INK)
    by_stage.set_ylabel("gold reward of the policy", fontsize=9, color=INK)
    by_kl.set_xlabel("KL to SFT, nats a completion", fontsize=9, color=INK)
    for ax in (by_stage, by_kl):
        ax.tick_params(labelsize=8, colors=INK)
        ax.grid(True, color=FAINT, linewidth=0.4)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _with_spread(values: list[float]) -> str:
    spread = f" +- {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _mean(values: dict[int, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")
