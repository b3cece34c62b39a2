"""The main job on a default that is part of the package: SFT, then DPO beside TR-DPO, on generated
preferences whose gold reward is known. No download, no GPU."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.metrics.plots import plot_comparison, plot_run, read_metrics
from fasttr.models.scratch import init_model
from fasttr.toy.judge import Judged, judge
from fasttr.toy.task import NOISE, preference_rows, prompts, sft_rows, write_jsonl
from fasttr.training.loop import train
from fasttr.training.run import say

RUNS: dict[str, dict[str, Any]] = {
    "DPO": {"ref_update": "none"},
    "TR-DPO hard": {"ref_update": "hard", "ref_update_every": 30},
    "TR-DPO soft": {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 15},
}
SAMPLES = 256


def demo(
    output_dir: str = "runs/demo", steps: int = 240, sft_steps: int = 400, seed: int = 0
) -> None:
    """Run it all and end in a table and pictures.

    Args:
        output_dir: folder for data, models, metrics and pictures; an earlier demo in it is
            replaced.
        steps: optimizer steps of each preference run.
        sft_steps: optimizer steps of the supervised start.
        seed: seed of data, weights, order and samples.
    """
    out, began = Path(output_dir), time.perf_counter()
    if out.exists() and not (out / "demo.json").exists() and any(out.iterdir()):
        raise FasttrError(
            f"output_dir: {out} holds something that is not a demo; wanted a new or empty folder"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "demo.json").write_text("{}\n")
    write_jsonl(sft_rows(4000, seed), out / "sft.jsonl")
    write_jsonl(preference_rows(2000, seed + 1), out / "train.jsonl")
    held_out = preference_rows(400, seed + 2, held_out=True)
    write_jsonl(held_out, out / "test.jsonl")
    init_model(
        "llama",
        hidden_size=96,
        num_layers=2,
        num_heads=4,
        vocab_size=260,
        tokenizer_data=out / "sft.jsonl",
        output_dir=out / "untrained",
        seed=seed,
    )

    common: dict[str, Any] = {
        "seed": seed,
        "logging_steps": 10,
        "gradient_checkpointing": False,
        "max_length": 128,
        "use_cpu": True,
    }
    say(f"\n== SFT: {sft_steps} steps on completions of the base distribution")
    train(
        TrainConfig(
            model_name_or_path=str(out / "untrained"),
            dataset_name=str(out / "sft.jsonl"),
            output_dir=str(out / "sft"),
            loss_type="sft",
            max_steps=sft_steps,
            train_batch_size=64,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            save_strategy="no",
            **common,
        )
    )

    asked = prompts(SAMPLES, seed + 3, held_out=True)
    start = judge(out / "sft", out / "sft", asked, seed)
    every = max(steps // 6, 1)
    folders: dict[str, Path] = {}
    final: dict[str, Judged] = {"SFT": start}
    for name, changes in RUNS.items():
        folders[name] = out / name.lower().replace(" ", "-")
        say(f"\n== {name}: {steps} steps on {2000} pairs labelled with noise {NOISE}")
        train(
            TrainConfig(
                model_name_or_path=str(out / "sft"),
                dataset_name=str(out / "train.jsonl"),
                eval_dataset_name=str(out / "test.jsonl"),
                output_dir=str(folders[name]),
                max_steps=steps,
                train_batch_size=32,
                learning_rate=5e-5,
                warmup_steps=10,
                beta=0.1,
                eval_strategy="steps",
                eval_steps=every,
                eval_on_start=True,
                save_strategy="steps",
                save_steps=every,
                **{**common, **changes},
            )
        )
        final[name] = _judge_run(folders[name], out / "sft", asked, start, seed)
        plot_run(folders[name])
    pictures = plot_comparison(folders, out / "plots")

    table = _table(final, folders)
    pair = sum(row["gold_chosen"] > row["gold_rejected"] for row in held_out) / len(held_out)
    say("\n" + table)
    say(
        f"held-out accuracy: of {len(held_out)} pairs, whose labels agree with the gold reward in "
        f"{pair:.1%}"
    )
    say(
        f"gold reward: of one sample for each of {SAMPLES} held-out prompts; KL: to the SFT "
        "policy, nats a completion"
    )
    say(
        f"example: {asked[0]!r} -> "
        + ", ".join(f"{k}: {v.completions[0]!r}" for k, v in final.items())
    )
    (out / "table.md").write_text(table + "\n")
    say(
        f"\npictures: {pictures[0].parent}; table: {out / 'table.md'}; "
        f"{time.perf_counter() - began:.0f} s in all"
    )


def _judge_run(folder: Path, initial: Path, asked: list[str], start: Judged, seed: int) -> Judged:
    """Judge every checkpoint and add what is found to the run's metrics."""
    judged = {0: start}
    for checkpoint in list_checkpoints(folder):
        judged[int(checkpoint.name.split("-")[1])] = judge(checkpoint, initial, asked, seed)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, found in judged.items():
            line = {
                "step": step,
                "eval_gold_reward": found.gold,
                "eval_gold_reward_stderr": found.gold_stderr,
                "eval_kl_to_initial": found.kl,
                "eval_kl_to_initial_stderr": found.kl_stderr,
                "eval_length": found.length,
            }
            file.write(json.dumps(line) + "\n")
    return judged[max(judged)]


def _table(final: dict[str, Judged], folders: dict[str, Path]) -> str:
    rows = [
        "| run | gold reward | KL to SFT | length | held-out accuracy | reference updates |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in final.items():
        accuracy, updates = "", ""
        if name in folders:
            lines = read_metrics(folders[name])
            last = [line for line in lines if "eval_anchor/rewards/accuracies" in line][-1]
            share, error = (last[f"eval_anchor/rewards/accuracies{end}"] for end in ("", "_stderr"))
            accuracy = f"{share:.3f} +- {error:.3f}"
            updates = str(max((line.get("ref/updates", 0) for line in lines), default=0))
        rows.append(
            f"| {name} | {found.gold:+.3f} +- {found.gold_stderr:.3f} | {found.kl:.1f} +- "
            f"{found.kl_stderr:.1f} "
            f"| {found.length:.1f} | {accuracy} | {updates} |"
        )
    return "\n".join(rows)
