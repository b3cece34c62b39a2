"""`fasttr ocrm --demo`: what correcting a reward model does, from nothing: the exact toy's picture,
then a small language model through the same stages. No download, no GPU."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasttr.config.ocrm_config import OcrmConfig
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.evaluation.stage_table import table
from fasttr.settings import SEED, setting, whole
from fasttr.toy.exact import ARMS, GOLDS, SFT_LOGP, Settings, run
from fasttr.toy.exact_plot import plot_stages
from fasttr.toy.start import supervised_start
from fasttr.toy.task import NOISE, prompts, sft_rows, write_jsonl
from fasttr.training.ocrm import run_ocrm

MARK = "ocrm-demo"  # says that a folder is a demo's
TAIL = 0.15  # share of the SFT rows that run past the asked length
SFT_ROWS, PROMPTS, HELD_OUT = 4000, 2000, 100
GOLDS_SHOWN = ("saturating", "interaction")


@dataclass(frozen=True)
class OcrmDemoSettings:
    """Demo."""

    output_dir: str = setting(
        "runs/ocrm-demo", None, "folder for all of it; an earlier demo in it is replaced"
    )
    seeds: int = setting(5, whole(2), "seeds of labels in the exact toy")
    sft_steps: int = setting(250, whole(1), "optimizer steps of the supervised start")
    stages: int = setting(4, whole(1), "stages of the language model")
    updates: int = setting(10, whole(1), "optimizer steps of a stage's policy")
    pairs: int = setting(800, whole(2), "pairs that the SFT policy writes")
    seed: int = setting(0, SEED, "seed of data, weights, order and samples")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def ocrm_demo(settings: OcrmDemoSettings) -> None:
    """Run it all and end in a table and a picture."""
    began = time.perf_counter()
    out = _empty_folder(settings.folder)
    picture = _exact_toy(settings)
    say(f"\n== a small language model on generated data, {settings.stages} stages")
    sft = _supervised_start(settings)
    results = run_ocrm(_config(settings, sft))
    say("\n" + table(results))
    say(
        f"gold reward: of two samples for each of {HELD_OUT} held-out prompts; KL: to the SFT "
        "policy, nats a completion"
    )
    seconds = time.perf_counter() - began
    say(f"\npicture: {picture}; table: {out / 'ocrm' / 'table.md'}; {seconds:.0f} s in all")


def _empty_folder(out: Path) -> Path:
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise FasttrError(
            f"output_dir: {out} holds something that is not a demo; wanted a new or empty folder"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()
    return out


def _exact_toy(settings: OcrmDemoSettings) -> Path:
    """The picture, and a line for each arm."""
    panels = {}
    for gold in GOLDS_SHOWN:
        runs = {
            arm: [run(arm, seed, Settings(gold=gold)) for seed in range(settings.seeds)]
            for arm in ARMS
        }
        panels[gold] = runs
        sft = float(np.exp(SFT_LOGP) @ GOLDS[gold])
        say(f"exact toy, {gold} gold reward: SFT {sft:.2f}; after 15 stages:")
        for arm, seeds in runs.items():
            ends = [stages[-1].gold for stages in seeds]
            say(f"  {arm:9} {np.mean(ends):+.2f} +- {np.std(ends):.2f}")
    start = {gold: float(np.exp(SFT_LOGP) @ GOLDS[gold]) for gold in GOLDS_SHOWN}
    return plot_stages(panels, start, settings.folder / "ocrm-toy.png")


def _supervised_start(settings: OcrmDemoSettings) -> Path:
    out, seed = settings.folder, settings.seed
    write_jsonl([{"prompt": one} for one in prompts(PROMPTS, seed + 1)], out / "prompts.jsonl")
    held_out = prompts(HELD_OUT, seed + 2, held_out=True)
    write_jsonl([{"prompt": one} for one in held_out], out / "judge.jsonl")
    rows = sft_rows(SFT_ROWS, seed, tail=TAIL)
    return supervised_start(out / "sft", rows, settings.sft_steps, seed=seed)


def _config(settings: OcrmDemoSettings, sft: Path) -> OcrmConfig:
    common = {"gradient_checkpointing": False, "bf16": False, "save_strategy": "no"}
    return OcrmConfig(
        model_name_or_path=str(sft),
        dataset_name=str(settings.folder / "prompts.jsonl"),
        judge_dataset_name=str(settings.folder / "judge.jsonl"),
        arms=["fixed", "weighted"],
        label_noise=NOISE,
        output_dir=str(settings.folder / "ocrm"),
        stages=settings.stages,
        updates_per_stage=settings.updates,
        pairs=settings.pairs,
        stop_ess=20,
        seed=settings.seed,
        use_cpu=True,
        rl={
            "train_batch_size": 64,
            "num_generations": 4,
            "beta": 1.0,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "normalize_advantages": True,
            "max_completion_length": 40,
            "logging_steps": 5,
            **common,
        },
        rm={
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "train_batch_size": 32,
            "num_train_epochs": 2.0,
            **common,
        },
    )
