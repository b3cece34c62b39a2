"""`python -m bench.paper.overoptimization`: gold reward against KL, as the TR paper's Figure 5, on
a generated task.

A small language model is fitted to the base distribution of `fasttr.generated` (SFT, once); for
each seed pairs are sampled from it and labelled with noise; DPO, IPO and KTO then train on them
through `fasttr.train`, each with a fixed, a soft and a hard reference, over a grid of beta. The
rate is constant after its warm-up, so that a checkpoint at step k is the end of a run of k steps.
Each checkpoint is judged by fresh samples for held-out prompts.

Arms of a seed share pairs, order, prompts and sampling noise. A finished run is not repeated.
Written into DIR: runs/*.json, results.json, table.md, verdict.md and the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.paper.curves import ARMS, Run, compare, table, verdict
from bench.paper.overopt_plots import plot_gold_against_kl, plot_steps
from fasttr.checkpoint.folder import list_checkpoints
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.files import write_json
from fasttr.metrics.plots import read_metrics
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.toy.judge import judge, sample
from fasttr.toy.start import COMMON, supervised_start
from fasttr.toy.task import NOISE, label_pair, prompts, sft_rows, write_jsonl
from fasttr.training.loop import train

# of a checkpoint's evaluation: on held-out pairs, under the policy or against the initial policy
ANCHORED = {
    "logps_chosen": "eval_logps/chosen",
    "logps_rejected": "eval_logps/rejected",
    "logratio_chosen": "eval_anchor/logratios/chosen",
    "logratio_rejected": "eval_anchor/logratios/rejected",
    "accuracy": "eval_anchor/rewards/accuracies",
}


@dataclass(frozen=True)
class Settings:
    """Of the whole study; `losses`, `beta` and `seeds` may grow from one call to the next, the
    others bind a folder."""

    losses: tuple[str, ...] = ("sigmoid", "ipo_sum", "kto_paired")
    beta: tuple[float, ...] = (0.1, 0.3, 1.0)
    seeds: int = 5
    steps: int = 120
    checkpoint_every: int = 20
    pairs: int = 1500
    test_pairs: int = 160
    samples: int = 256
    noise: float = NOISE
    batch: int = 32
    learning_rate: float = 1e-4
    alpha: float = 0.6
    soft_every: int = 10
    tau: int = 20
    width: int = 96
    sft_steps: int = 400
    sft_pairs: int = 4000

    @property
    def bound(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in dataclasses.asdict(self).items()
            if k not in ("losses", "beta", "seeds")
        }

    def reference(self, arm: str) -> dict[str, Any]:
        """The keys of a TrainConfig."""
        return {
            "fixed": {"ref_update": "none"},
            "soft": {
                "ref_update": "soft",
                "ref_update_alpha": self.alpha,
                "ref_update_every": self.soft_every,
            },
            "hard": {"ref_update": "hard", "ref_update_every": self.tau},
        }[arm]


QUICK = Settings(
    beta=(0.3,), seeds=2, steps=60, pairs=800, test_pairs=64, samples=128, sft_steps=250
)


def study(settings: Settings, out: Path, progress: bool = True) -> list[Run]:
    """Every run of the grid, those that are in `out` already as they were found there."""
    cells = list(itertools.product(range(settings.seeds), settings.beta, settings.losses, ARMS))
    _bind(settings, out)
    sft = _sft(settings, out)
    runs = []
    for seed, beta, loss, arm in tqdm(
        cells, desc="over-optimisation", unit="run", disable=None if progress else True
    ):
        path = out / "runs" / f"{loss}-{arm}-beta{beta:g}-seed{seed}.json"
        if not path.exists():
            rows = _align(settings, out, sft, loss, arm, beta, seed)
            write_json(path, {"loss": loss, "arm": arm, "beta": beta, "seed": seed, "rows": rows})
        runs.append(Run(**json.loads(path.read_text())))
    return runs


def _bind(settings: Settings, out: Path) -> None:
    """A folder belongs to one setting: what was run under another would be mixed into the same
    picture."""
    path = out / "settings.json"
    if path.exists():
        saved = json.loads(path.read_text())
        changed = [
            f"{k}: {saved.get(k)!r} -> {v!r}"
            for k, v in settings.bound.items()
            if saved.get(k) != v
        ]
        if changed:
            raise SystemExit(
                f"--out: {out} holds runs of other settings ({'; '.join(changed)}); name another "
                "folder"
            )
    else:
        write_json(path, settings.bound)


def _sft(settings: Settings, out: Path) -> Path:
    """The initial policy's folder; made once."""
    rows = sft_rows(settings.sft_pairs, seed=0)
    steps, width = settings.sft_steps, settings.width
    with _quiet(out / "sft.log"):
        return supervised_start(out / "sft", rows, steps, width=width, disable_tqdm=True)


def _data(settings: Settings, out: Path, sft: Path, seed: int) -> tuple[Path, Path]:
    """Pairs of a seed to train on and held-out ones, sampled from the initial policy and labelled
    with noise."""
    paths = []
    for k, (split, n) in enumerate((("train", settings.pairs), ("test", settings.test_pairs))):
        path = out / f"{split}-seed{seed}.jsonl"
        paths.append(path)
        if path.exists():
            continue
        tokenizer, model = (
            load_tokenizer(str(sft)),
            load_model(ModelConfig(str(sft))),
        )
        own = 10_000 * (seed + 1) + 10 * k
        asked = prompts(
            n + n // 10 + 8, seed=own, held_out=split == "test"
        )  # some draws are equal, or empty
        sides = [
            [
                tokenizer.decode(ids, skip_special_tokens=True)
                for _, ids in sample(model, tokenizer, asked, own + side)
            ]
            for side in (1, 2)
        ]
        rng = np.random.default_rng(own + 3)
        pairs = [(p, a, b) for p, a, b in zip(asked, *sides, strict=True) if a and b and a != b]
        write_jsonl([label_pair(*pair, rng, settings.noise) for pair in pairs[:n]], path)
    return paths[0], paths[1]


def _align(
    settings: Settings, out: Path, sft: Path, loss: str, arm: str, beta: float, seed: int
) -> list[dict[str, float]]:
    """Train one cell and judge its checkpoints: one row a checkpoint, the initial policy first."""
    train_file, test_file = _data(settings, out, sft, seed)
    folder = out / "runs" / f"{loss}-{arm}-beta{beta:g}-seed{seed}"
    every = settings.checkpoint_every
    with _quiet(out / "runs.log"):
        train(
            TrainConfig(
                model_name_or_path=str(sft),
                dataset_name=str(train_file),
                eval_dataset_name=str(test_file),
                output_dir=str(folder),
                overwrite_output_dir=True,
                loss_type=loss,
                beta=beta,
                max_steps=settings.steps,
                train_batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                warmup_steps=10,
                lr_scheduler_type="constant_with_warmup",
                eval_strategy="steps",
                eval_steps=every,
                eval_on_start=True,
                save_strategy="steps",
                save_steps=every,
                logging_steps=every,
                seed=seed,
                disable_tqdm=True,
                **settings.reference(arm),
                **COMMON,
            )
        )
    measured = {line["step"]: line for line in read_metrics(folder) if "eval_loss" in line}
    asked = prompts(settings.samples, seed=500 + seed, held_out=True)
    rows = []
    for step, checkpoint in [
        (0, sft),
        *((int(c.name.split("-")[1]), c) for c in list_checkpoints(folder)),
    ]:
        found = judge(checkpoint, sft, asked, seed)
        row = {
            "step": step,
            "gold": found.gold.value,
            "gold_stderr": found.gold.stderr,
            "kl": found.kl.value,
            "kl_stderr": found.kl.stderr,
            "length": found.length,
        }
        row |= {name: measured[step][key] for name, key in ANCHORED.items() if step in measured}
        rows.append(row)
    shutil.rmtree(folder)
    return rows


@contextlib.contextmanager
def _quiet(log: Path) -> Any:
    """A run's own lines go into a file: only the study's progress is shown."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        yield


def write(settings: Settings, runs: list[Run], out: Path) -> None:
    """Tables, pictures and the verdict of the runs."""
    compared = [
        {"loss": loss, "arm": arm}
        | {k: v._asdict() for k, v in compare(runs, loss, arm)._asdict().items()}
        for loss, arm in itertools.product(settings.losses, ARMS[1:])
    ]
    write_json(
        out / "results.json",
        {
            "settings": dataclasses.asdict(settings),
            "torch": torch.__version__,
            "compared": compared,
            "runs": [run._asdict() for run in runs],
        },
    )
    (out / "table.md").write_text(table(runs) + "\n")
    (out / "verdict.md").write_text("\n".join(f"- {line}" for line in verdict(runs)) + "\n")
    plot_gold_against_kl(runs, out / "gold-against-kl.png")
    plot_steps(runs, out / "steps.png")


def main(argv: list[str] | None = None) -> None:
    d = Settings()
    about = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.overoptimization", description=about
    )
    parser.add_argument("--out", type=Path, default=Path("runs/paper/overoptimization"))
    parser.add_argument(
        "--quick", action="store_true", help="one beta, two seeds, half the steps: 2 to 3 minutes"
    )
    for field in dataclasses.fields(Settings):
        value = getattr(d, field.name)
        several: dict[str, Any] = (
            {"nargs": "+", "type": type(value[0])} if isinstance(value, tuple) else {}
        )
        parser.add_argument(
            f"--{field.name}", help=f"default {value}", **{"type": type(value), **several}
        )
    asked = vars(parser.parse_args(argv))
    out, quick = asked.pop("out"), asked.pop("quick")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in asked.items() if v is not None}
    settings = dataclasses.replace(QUICK if quick else d, **given)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        runs = study(settings, out)
    except FasttrError as error:
        parser.error(str(error))
    write(settings, runs, out)
    print((out / "table.md").read_text())
    print((out / "verdict.md").read_text())
    print(
        f"{len(runs)} runs in {time.perf_counter() - began:.0f} s, those found finished included; "
        f"all in {out}"
    )


if __name__ == "__main__":
    main()
