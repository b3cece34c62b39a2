"""The main job on a default that is part of the package: SFT, then DPO beside TR-DPO, on generated
preferences whose gold reward is known. No download, no GPU."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttr.checkpoint.folder import list_checkpoints, step_of
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.metrics.plots import plot_comparison, plot_run, read_metrics
from fasttr.models.scratch import init_model
from fasttr.settings import setting, whole
from fasttr.toy.judge import Judged, judge
from fasttr.toy.task import NOISE, preference_rows, prompts, sft_rows, write_jsonl
from fasttr.training.loop import train

ARMS: dict[str, dict[str, Any]] = {
    "DPO": {"ref_update": "none"},
    "TR-DPO hard": {"ref_update": "hard", "ref_update_every": 30},
    "TR-DPO soft": {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 15},
}
SFT_ROWS, PAIRS, HELD_OUT_PAIRS, PROMPTS = 4000, 2000, 400, 256
EVALUATIONS = 6  # of each arm
MARK = "demo.json"  # says that a folder is a demo's


@dataclass(frozen=True)
class DemoSettings:
    """Demo."""

    output_dir: str = setting(
        "runs/demo",
        None,
        "folder for data, models, metrics and pictures; an earlier demo in it is replaced",
    )
    steps: int = setting(240, whole(1), "optimizer steps of each preference run")
    sft_steps: int = setting(400, whole(1), "optimizer steps of the supervised start")
    seed: int = setting(0, None, "seed of data, weights, order and samples")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def common(self) -> dict[str, Any]:
        """Settings that all runs share."""
        return {
            "seed": self.seed,
            "logging_steps": 10,
            "gradient_checkpointing": False,
            "max_length": 128,
            "use_cpu": True,
        }


def demo(settings: DemoSettings) -> None:
    """Run it all and end in a table and pictures."""
    began = time.perf_counter()
    out = _empty_folder(settings.folder)
    held_out = _write_data(settings)
    _supervised_start(settings)
    asked = prompts(PROMPTS, settings.seed + 3, held_out=True)
    start = judge(out / "sft", out / "sft", asked, settings.seed)
    folders: dict[str, Path] = {}
    judged: dict[str, Judged] = {"SFT": start}
    for name, changes in ARMS.items():
        folders[name] = out / name.lower().replace(" ", "-")
        _train_arm(settings, name, folders[name], changes)
        judged[name] = _judge_run(folders[name], out / "sft", asked, start, settings.seed)
        plot_run(folders[name])
    pictures = plot_comparison(folders, out / "plots")
    table = _table(judged, folders)
    (out / "table.md").write_text(table + "\n")
    say("\n" + table)
    _explain(held_out, asked[0], judged)
    seconds = time.perf_counter() - began
    say(f"\npictures: {pictures[0].parent}; table: {out / 'table.md'}; {seconds:.0f} s in all")


def _empty_folder(out: Path) -> Path:
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise FasttrError(
            f"output_dir: {out} holds something that is not a demo; wanted a new or empty folder"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("{}\n")
    return out


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
            **settings.common(),
        )
    )


def _train_arm(settings: DemoSettings, name: str, folder: Path, changes: dict[str, Any]) -> None:
    out, every = settings.folder, max(settings.steps // EVALUATIONS, 1)
    say(f"\n== {name}: {settings.steps} steps on {PAIRS} pairs labelled with noise {NOISE}")
    train(
        TrainConfig(
            model_name_or_path=str(out / "sft"),
            dataset_name=str(out / "train.jsonl"),
            eval_dataset_name=str(out / "test.jsonl"),
            output_dir=str(folder),
            max_steps=settings.steps,
            train_batch_size=32,
            learning_rate=5e-5,
            warmup_steps=10,
            beta=0.1,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=True,
            save_strategy="steps",
            save_steps=every,
            **settings.common(),
            **changes,
        )
    )


def _judge_run(folder: Path, initial: Path, asked: list[str], start: Judged, seed: int) -> Judged:
    """Judge every checkpoint and add what is found to the run's metrics."""
    judged = {0: start}
    for checkpoint in list_checkpoints(folder):
        step = step_of(checkpoint)
        assert step is not None
        judged[step] = judge(checkpoint, initial, asked, seed)
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
    return judged[max(judged)]


def _table(judged: dict[str, Judged], folders: dict[str, Path]) -> str:
    rows = [
        "| run | gold reward | KL to SFT | length | held-out accuracy | reference updates |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in judged.items():
        accuracy, updates = _of_metrics(folders[name]) if name in folders else ("", "")
        cells = [
            name,
            f"{found.gold.value:+.3f} +- {found.gold.stderr:.3f}",
            f"{found.kl.value:.1f} +- {found.kl.stderr:.1f}",
            f"{found.length:.1f}",
            accuracy,
            updates,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _of_metrics(folder: Path) -> tuple[str, str]:
    """The last held-out accuracy against the initial policy, and how often the reference moved."""
    lines = read_metrics(folder)
    last = [line for line in lines if "eval_anchor/rewards/accuracies" in line][-1]
    share = last["eval_anchor/rewards/accuracies"]
    stderr = last["eval_anchor/rewards/accuracies_stderr"]
    updates = max((line.get("ref/updates", 0) for line in lines), default=0)
    return f"{share:.3f} +- {stderr:.3f}", str(updates)


def _explain(held_out: list[dict[str, Any]], prompt: str, judged: dict[str, Judged]) -> None:
    agreeing = sum(row["gold_chosen"] > row["gold_rejected"] for row in held_out)
    say(
        f"held-out accuracy: of {len(held_out)} pairs, whose labels agree with the gold reward in "
        f"{agreeing / len(held_out):.1%}"
    )
    say(
        f"gold reward: of one sample for each of {PROMPTS} held-out prompts; KL: to the SFT "
        "policy, nats a completion"
    )
    examples = [f"{name}: {found.completions[0]!r}" for name, found in judged.items()]
    say(f"example: {prompt!r} -> {', '.join(examples)}")
