"""The main job on a default that is part of the package: SFT, then DPO beside TR-DPO, on generated
preferences whose gold reward is known. No download, no GPU.

Stopped by Ctrl-C, the same command goes on with it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttr.checkpoint.folder import holds_final, list_checkpoints, step_of
from fasttr.config.train_config import TrainConfig
from fasttr.console import duration, say
from fasttr.errors import FasttrError
from fasttr.files import write_json, write_text
from fasttr.metrics.log import last_line
from fasttr.metrics.plots import plot_comparison, plot_run
from fasttr.metrics.results import Results, write_results
from fasttr.models.scratch import init_model
from fasttr.report.page import FILE as REPORT
from fasttr.report.page import write_report
from fasttr.settings import setting, whole
from fasttr.toy.demo_table import Arm, Reading, table, verdict
from fasttr.toy.judge import Judged, judge
from fasttr.toy.task import (
    NOISE,
    gold_reward,
    preference_rows,
    prompts,
    sft_rows,
    write_jsonl,
)
from fasttr.training.loop import train
from fasttr.training.stopping import Interrupted

# The two references trail the policy by about 14 and 9 steps on average: they are not one method.
ARMS: dict[str, dict[str, Any]] = {
    "DPO": {"ref_update": "none"},
    "TR-DPO hard": {"ref_update": "hard", "ref_update_every": 30},
    "TR-DPO soft": {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 8},
}
SFT_ROWS, PAIRS, HELD_OUT_PAIRS, PROMPTS = 4000, 2000, 400, 256
EVALUATIONS = 4  # of each arm
MARK = "demo.json"  # says that a folder is a demo's, and with which settings


@dataclass(frozen=True)
class DemoSettings:
    """Demo."""

    output_dir: str = setting(
        "runs/demo",
        None,
        "folder for data, models, metrics and pictures; the same settings go on with a demo in it, "
        "others replace it",
    )
    steps: int = setting(120, whole(1), "optimizer steps of each preference run")
    sft_steps: int = setting(300, whole(1), "optimizer steps of the supervised start")
    seeds: int = setting(3, whole(1), "runs of each arm, which differ in their order of rows")
    seed: int = setting(0, None, "first seed of data, weights, order and samples")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def common(self) -> dict[str, Any]:
        """Settings that all runs share."""
        return {
            "logging_steps": 10,
            "gradient_checkpointing": False,
            "max_length": 128,
            "use_cpu": True,
        }


def demo(settings: DemoSettings) -> None:
    """Run it all and end in a table, a verdict, pictures and a report."""
    try:
        _demo(settings)
    except Interrupted:
        say("the same command goes on with the demo")
        raise


def _demo(settings: DemoSettings) -> None:
    began = time.perf_counter()
    out = _folder(settings)
    held_out = _write_data(settings)
    _supervised_start(settings)
    asked = prompts(PROMPTS, settings.seed + 3, held_out=True)
    start = judge(out / "sft", out / "sft", asked, settings.seed)
    arms = [Arm(name, []) for name in ARMS]
    folders: dict[str, Path] = {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for arm in arms:
            folder = out / f"{arm.name.lower().replace(' ', '-')}-seed-{seed}"
            _train_arm(settings, arm.name, folder, seed)
            arm.readings.append(_judge_run(folder, out / "sft", asked, start, seed))
            folders.setdefault(arm.name, folder)
            if seed == settings.seed:
                seconds = time.perf_counter() - began
                say(f"pictures: {plot_run(folder)[0].parent}, after {duration(seconds)}")
    pictures = plot_comparison(folders, out / "plots")
    report = write_report(list(folders.values()), out / REPORT)
    text = "\n\n".join([table(start, arms), *verdict(arms)])
    write_text(out / "table.md", text + "\n")
    say("\n" + text)
    _explain(held_out, asked, arms)
    seconds = time.perf_counter() - began
    say(f"\npictures: {pictures[0].parent}; report: {report}; {duration(seconds)} in all")


def _folder(settings: DemoSettings) -> Path:
    """The folder of this demo, made or gone on with; that of another demo is replaced."""
    out = settings.folder
    mark = out / MARK
    if out.exists() and not mark.exists() and any(out.iterdir()):
        raise FasttrError(
            f"output_dir: {out} holds something that is not a demo; wanted a new or empty folder"
        )
    told = dataclasses.asdict(settings)
    if mark.exists() and json.loads(mark.read_text()) == told:
        say(f"going on with the demo in {out}")
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_json(mark, told)
    return out


def _is_done(folder: Path) -> bool:
    return "train_runtime" in last_line(folder) and holds_final(folder)


def _write_data(settings: DemoSettings) -> list[dict[str, Any]]:
    """Rows for every stage; returns the held-out pairs."""
    out, seed = settings.folder, settings.seed
    write_jsonl(sft_rows(SFT_ROWS, seed), out / "sft.jsonl")
    write_jsonl(preference_rows(PAIRS, seed + 1), out / "train.jsonl")
    held_out = preference_rows(HELD_OUT_PAIRS, seed + 2, held_out=True)
    write_jsonl(held_out, out / "test.jsonl")
    return held_out


def _supervised_start(settings: DemoSettings) -> None:
    out = settings.folder
    if _is_done(out / "sft"):
        return
    if not holds_final(out / "untrained"):
        init_model(
            "llama",
            hidden_size=96,
            num_layers=2,
            num_heads=4,
            vocab_size=260,
            tokenizer_data=str(out / "sft.jsonl"),
            output_dir=str(out / "untrained"),
            seed=settings.seed,
        )
    say(f"\n== SFT: {settings.sft_steps} steps on completions of the base distribution")
    train(
        TrainConfig(
            model_name_or_path=str(out / "untrained"),
            dataset_name=str(out / "sft.jsonl"),
            output_dir=str(out / "sft"),
            loss_type="sft",
            max_steps=settings.sft_steps,
            train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            save_strategy="no",
            resume_from_checkpoint=True,
            seed=settings.seed,
            **settings.common(),
        )
    )


def _train_arm(settings: DemoSettings, name: str, folder: Path, seed: int) -> None:
    if (folder / "judged.json").exists():
        return
    out, every = settings.folder, max(settings.steps // EVALUATIONS, 1)
    say(f"\n== {name}, seed {seed}: {settings.steps} steps on {PAIRS} pairs, label noise {NOISE}")
    train(
        TrainConfig(
            model_name_or_path=str(out / "sft"),
            dataset_name=str(out / "train.jsonl"),
            eval_dataset_name=str(out / "test.jsonl"),
            output_dir=str(folder),
            max_steps=settings.steps,
            train_batch_size=32,
            learning_rate=1e-4,
            warmup_steps=10,
            beta=0.1,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=True,
            save_strategy="steps",
            save_steps=every,
            resume_from_checkpoint=True,
            seed=seed,
            **settings.common(),
            **ARMS[name],
        )
    )


def _judge_run(folder: Path, initial: Path, asked: list[str], start: Judged, seed: int) -> Reading:
    """Judge every checkpoint, once, and add what is found to the run's metrics."""
    kept = folder / "judged.json"
    if not kept.exists():
        judged = {0: start}
        for checkpoint in list_checkpoints(folder):
            step = step_of(checkpoint)
            assert step is not None
            judged[step] = judge(checkpoint, initial, asked, seed)
        golds = {step: _golds(asked, one) for step, one in judged.items()}
        last = max(judged)
        rows = f"{len(asked)} held-out prompts, the first {asked[0]}"
        _add_to_metrics(folder, judged)
        write_results(
            folder,
            Results("gold_reward", "gold reward of samples", rows, golds[last], last),
        )
        facts = {
            "golds": golds,
            "kl": {step: one.kl.value for step, one in judged.items()},
            "length": judged[last].length,
            "completions": judged[last].completions,
        }
        write_json(kept, facts)
    return Reading.of(folder, json.loads(kept.read_text()))


def _golds(asked: list[str], judged: Judged) -> list[float]:
    return [gold_reward(*pair) for pair in zip(asked, judged.completions, strict=True)]


def _add_to_metrics(folder: Path, judged: dict[int, Judged]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step, found in judged.items():
            line = {
                "step": step,
                "eval_gold_reward": found.gold.value,
                "eval_gold_reward_stderr": found.gold.stderr,
                "eval_kl_to_initial": found.kl.value,
                "eval_kl_to_initial_stderr": found.kl.stderr,
                "eval_length": found.length,
            }
            file.write(json.dumps(line) + "\n")


def _explain(held_out: list[dict[str, Any]], asked: list[str], arms: list[Arm]) -> None:
    agreeing = sum(row["gold_chosen"] > row["gold_rejected"] for row in held_out)
    say(
        f"gold reward: one sample for each of {PROMPTS} held-out prompts; KL: to the SFT policy, "
        "nats a sample;"
    )
    say(
        f"accuracy: against the initial policy, of {len(held_out)} held-out pairs, whose labels "
        f"agree with the gold reward in {agreeing / len(held_out):.1%}"
    )
    say(f"example: {asked[0]}")
    for arm in arms:
        say(f"  {arm.name:12} {_visible(arm.readings[0].completions[0])}")


def _visible(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text)
