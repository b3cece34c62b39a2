"""`python -m bench.paper.toy_mdp`: the TR paper's Figure 2 (arXiv:2404.09656) with fasttr's own
losses and reference.

DPO, IPO and KTO, each with a fixed, a soft and a hard reference, on a tree of actions
(`bench.paper.mdp`), for two
constructions of pairs: `early`, whose sides differ from the first action on, and `shared`, whose
sides share all actions but the last. Written into DIR: results.json, table.md, summary.md,
verdict.md and the pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.paper.mdp import NETWORKS, History, Tree, align, draw_pairs, fit
from bench.paper.toy_plots import plot_figure, plot_finals
from fasttr.losses import LOSSES, make_loss
from fasttr.reference.schedule import Fixed, Hard, Schedule, Soft
from fasttr.toy.stats import Interval, interval, words

ARMS = ("fixed", "soft", "hard")
NAMES = {
    "sigmoid": "DPO",
    "ipo_sum": "IPO (sums)",
    "ipo": "IPO (token means)",
    "kto_paired": "KTO (paired)",
    "kto": "KTO",
}
CONSTRUCTIONS = {
    "early": "pairs that differ from the first action on",
    "shared": "pairs that share their leading actions",
    "random": "any two leaves",
}
UNKNOWN = (
    "depth of the tree (here an option, 3)",
    "network and its size (the source is recalled to use an RNN; here an Elman RNN of 16, or a "
    "table)",
    "whether and how long the policy is fitted to the pairs first (here 60 steps of maximum "
    "likelihood on both sides)",
    "number of pairs and how they are drawn (here both constructions, which disagree)",
    "which sequences count as out of distribution (here every path in no pair)",
    "optimizer, learning rate and number of steps (here Adam, 3e-3, 600)",
    "beta of the TR runs (arXiv:2406.02900 used 0.01, 0.1 and 0.5 for DPO; here 0.1 and 0.5)",
    "how often the soft update fires (here after every step)",
)
Key = tuple[str, str, float]  # construction, loss, beta


@dataclass(frozen=True)
class Settings:
    """Of the whole study."""

    seeds: int = 100
    depth: int = 3
    actions: int = 3
    network: str = "rnn"
    hidden: int = 16
    pairs: int = 3
    shared_pairs: int = 1
    shared_actions: int | None = None  # None: all but the last
    beta: tuple[float, ...] = (0.1, 0.5)
    losses: tuple[str, ...] = ("sigmoid", "ipo_sum", "kto_paired", "kto")
    constructions: tuple[str, ...] = ("early", "shared")
    alpha: float = 0.6
    soft_every: int = 1
    tau: int = 8
    sft_steps: int = 60
    steps: int = 600
    learning_rate: float = 3e-3

    @property
    def schedules(self) -> dict[str, Schedule]:
        return {"fixed": Fixed(), "soft": Soft(self.alpha, self.soft_every), "hard": Hard(self.tau)}

    def pairs_of(self, construction: str) -> tuple[int, int | None]:
        """How many pairs, and how many leading actions their sides share (None: as it falls)."""
        shared = self.depth - 1 if self.shared_actions is None else self.shared_actions
        return {
            "early": (self.pairs, 0),
            "shared": (self.shared_pairs, shared),
            "random": (self.pairs, None),
        }[construction]


def study(settings: Settings, progress: bool = True) -> dict[Key, dict[str, History]]:
    """Every run: (construction, loss, beta) -> arm -> its history. Arms start from the same weights
    and pairs."""
    out: dict[Key, dict[str, History]] = {}
    tree, seeds = Tree(settings.depth, settings.actions), list(range(settings.seeds))
    cells = list(itertools.product(settings.constructions, settings.losses, settings.beta))
    with tqdm(
        total=len(cells) * len(ARMS), desc="toy MDP", unit="run", disable=None if progress else True
    ) as bar:
        for construction in settings.constructions:
            pairs = draw_pairs(tree, seeds, *settings.pairs_of(construction))
            initial = NETWORKS[settings.network](tree, seeds, settings.hidden)
            fit(initial, pairs, settings.sft_steps, settings.learning_rate)
            for name, beta in itertools.product(settings.losses, settings.beta):
                loss = make_loss([name], beta=beta)
                out[construction, name, beta] = {}
                for arm, schedule in settings.schedules.items():
                    history = align(
                        initial, pairs, loss, schedule, settings.steps, settings.learning_rate
                    )
                    out[construction, name, beta][arm] = history
                    bar.update()
    return out


def against_fixed(arms: dict[str, History], arm: str) -> tuple[Interval, float]:
    """Final out-of-distribution mass of a moving arm less that of the fixed one, seed by seed, and
    the share of seeds in which it is lower."""
    difference = arms[arm].ood[-1] - arms["fixed"].ood[-1]
    return interval(difference), float((difference < 0).mean())


def statistics(arms: dict[str, History]) -> dict[str, Any]:
    """What the tables and results.json hold of one cell."""
    out = {}
    for arm, h in arms.items():
        mean = h.ood.mean(1)
        out[arm] = {
            "ood_start": mean[0],
            "ood_max": mean.max(),
            "ood_end": mean[-1],
            "ood_end_std": h.ood[-1].std(),
            "ood_end_quantiles": np.quantile(h.ood[-1], [0.1, 0.25, 0.5, 0.75, 0.9]),
            "seeds_above_their_start": (h.ood[-1] > h.ood[0]).mean(),
            "chosen_end": h.chosen[-1].mean(),
            "rejected_end": h.rejected[-1].mean(),
            "kl_end": h.kl[-1].mean(),
        }
        if arm != "fixed":
            difference, lower = against_fixed(arms, arm)
            out[arm] |= {
                "ood_end_less_fixed": difference._asdict(),
                "seeds_lower_than_fixed": lower,
            }
    return json.loads(json.dumps(out, default=lambda x: x.tolist()))


def full_table(runs: dict[Key, dict[str, History]]) -> str:
    rows = [
        "| pairs | loss | beta | reference | OOD start > max > end | std | 10 / 50 / 90 % | chosen "
        "| rejected | KL "
        "| less fixed, 95 % | seeds lower |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (construction, name, beta), arms in runs.items():
        for arm, s in statistics(arms).items():
            low, _, mid, _, high = (f"{q:.2f}" for q in s["ood_end_quantiles"])
            less = " | "
            if arm != "fixed":
                interval = Interval(**s["ood_end_less_fixed"]).text(2)
                less = f"{interval} | {s['seeds_lower_than_fixed']:.0%}"
            rows.append(
                f"| {construction} | {NAMES.get(name, name)} | {beta:g} | {arm} | "
                f"{s['ood_start']:.2f} > "
                f"{s['ood_max']:.2f} > {s['ood_end']:.2f} | {s['ood_end_std']:.2f} | {low} / {mid} "
                f"/ {high} "
                f"| {s['chosen_end']:.2f} | {s['rejected_end']:.2f} | {s['kl_end']:.2f} | {less} |"
            )
    return "\n".join(rows)


def summary_table(runs: dict[Key, dict[str, History]]) -> str:
    """A line a cell: final OOD mass of each arm, mean (median), and that of the moving ones less
    the fixed one's."""
    rows = [
        "| pairs | loss | beta | fixed | soft | hard | soft less fixed | hard less fixed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (construction, name, beta), arms in runs.items():
        ends = [f"{arms[a].ood[-1].mean():.2f} ({np.median(arms[a].ood[-1]):.2f})" for a in ARMS]
        less = [against_fixed(arms, arm)[0].text(2) for arm in ARMS[1:]]
        rows.append(
            f"| {construction} | {NAMES.get(name, name)} | {beta:g} | {' | '.join(ends + less)} |"
        )
    return "\n".join(rows)


def verdict(runs: dict[Key, dict[str, History]]) -> list[str]:
    """The paper's claim (a moving reference lowers the mass out of distribution), cell by cell, in
    words."""
    lines = []
    for (construction, name, beta), arms in runs.items():
        for arm in ARMS[1:]:
            difference, lower = against_fixed(arms, arm)
            said = words(
                difference,
                "does not hold, it raises the mean mass",
                "holds, it lowers the mean mass",
                "is not shown, zero lies within the interval",
            )
            lines.append(
                f"{construction}, {NAMES.get(name, name)}, beta {beta:g}, {arm}: the claim {said}; "
                f"lower in {lower:.0%} of seeds"
            )
    return lines


def write(
    settings: Settings, runs: dict[Key, dict[str, History]], out: Path, seconds: float
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    cells = [
        {
            "construction": construction,
            "loss": name,
            "beta": beta,
            "arms": statistics(arms),
            "final_ood": {arm: arms[arm].ood[-1].round(5).tolist() for arm in ARMS},
        }
        for (construction, name, beta), arms in runs.items()
    ]
    document = {
        "settings": asdict(settings),
        "not_known_of_the_paper": UNKNOWN,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "cells": cells,
    }
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "table.md").write_text(full_table(runs) + "\n")
    (out / "summary.md").write_text(summary_table(runs) + "\n")
    notes = [f"- {line}" for line in verdict(runs)]
    notes += ["", "Not known of the paper's setting:", *(f"- {line}" for line in UNKNOWN)]
    (out / "verdict.md").write_text("\n".join(notes) + "\n")
    for construction, name, beta in runs:
        shown = f"{NAMES.get(name, name)}, beta {beta:g}, {settings.seeds} seeds"
        title = f"{shown}: {CONSTRUCTIONS[construction]}"
        plot_figure(
            runs[construction, name, beta],
            title,
            NAMES.get(name, name).split()[0],
            settings.schedules,
            out / f"{construction}-{name}-beta{beta:g}.png",
        )
    for construction in settings.constructions:
        cells_here = {
            (NAMES.get(n, n), b): arms for (c, n, b), arms in runs.items() if c == construction
        }
        plot_finals(
            cells_here,
            f"Final mass out of distribution, a dot a seed: {CONSTRUCTIONS[construction]}",
            out / f"finals-{construction}.png",
        )


def main(argv: list[str] | None = None) -> None:
    d = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.toy_mdp", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=d.seeds)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/paper/toy_mdp"),
        help="folder for results and pictures",
    )
    parser.add_argument("--depth", type=int, default=d.depth, help="actions of a completion")
    parser.add_argument("--actions", type=int, default=d.actions, help="actions at every state")
    parser.add_argument("--network", choices=NETWORKS, default=d.network)
    parser.add_argument("--hidden", type=int, default=d.hidden, help="width of the RNN")
    parser.add_argument("--pairs", type=int, default=d.pairs, help="pairs of early and random")
    parser.add_argument("--shared_pairs", type=int, default=d.shared_pairs, help="pairs of shared")
    parser.add_argument(
        "--shared_actions",
        type=int,
        help="leading actions that a pair of shared has in common; default: all but the last",
    )
    parser.add_argument("--beta", type=float, nargs="+", default=d.beta)
    parser.add_argument(
        "--losses",
        nargs="+",
        default=d.losses,
        choices=sorted(LOSSES),
        metavar="LOSS",
        help="names of loss_type that have a reference",
    )
    parser.add_argument(
        "--constructions", nargs="+", default=d.constructions, choices=CONSTRUCTIONS
    )
    parser.add_argument(
        "--alpha", type=float, default=d.alpha, help="share of the policy in a soft update"
    )
    parser.add_argument(
        "--soft_every", type=int, default=d.soft_every, help="steps between soft updates"
    )
    parser.add_argument("--tau", type=int, default=d.tau, help="steps between hard updates")
    parser.add_argument("--sft_steps", type=int, default=d.sft_steps)
    parser.add_argument("--steps", type=int, default=d.steps)
    parser.add_argument("--learning_rate", type=float, default=d.learning_rate)
    values = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()
    }
    out = values.pop("out")
    settings = Settings(**values)
    if wrong := [name for name in settings.losses if not LOSSES[name].needs_reference]:
        parser.error(f"--losses: got {', '.join(wrong)}, which have no reference to move")
    began = time.perf_counter()
    try:
        runs = study(settings)
    except ValueError as error:  # of a loss's settings, or of pairs that the tree has no room for
        parser.error(str(error))
    seconds = time.perf_counter() - began
    write(settings, runs, out, seconds)
    print((out / "summary.md").read_text())
    print((out / "verdict.md").read_text())
    print(
        f"{len(runs) * len(ARMS)} runs of {settings.seeds} seeds in {seconds:.0f} s; all in {out}"
    )


if __name__ == "__main__":
    main()
