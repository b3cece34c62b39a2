"""SFT, then DPO and IPO with a fixed, soft and hard reference, on a file of real preference pairs:
one table.

    python -m bench.real_data --train train.jsonl.gz --test test.jsonl.gz \\
        --dataset_format hh_rlhf --out runs/hh

A small model from random weights learns little about preferences from a thousand pairs: the table
shows that every part works on real text, with intervals, and not how well a method aligns.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from fasttr import TrainConfig, train
from fasttr.metrics.plots import read_metrics
from fasttr.models.scratch import init_model

SCHEDULES: dict[str, dict[str, Any]] = {
    "none": {"ref_update": "none"},
    "soft": {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 16},
    "hard": {"ref_update": "hard", "ref_update_every": 32},
}
BETA = {"sigmoid": 0.1, "ipo": 0.1, "ipo_sum": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="preference file to train on")
    parser.add_argument("--test", required=True, help="preference file to evaluate on")
    parser.add_argument("--dataset_format", default=None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--vocab_size", type=int, default=2000)
    parser.add_argument("--sft_epochs", type=float, default=3.0)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--losses", nargs="+", default=["sigmoid", "ipo"])
    args = parser.parse_args()

    init_model(
        "llama",
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        num_heads=4,
        vocab_size=args.vocab_size,
        tokenizer_data=args.train,
        output_dir=args.out / "model",
    )
    common = {
        "dataset_name": args.train,
        "eval_dataset_name": args.test,
        "dataset_format": args.dataset_format,
        "max_length": 512,
        "train_batch_size": 16,
        "gradient_checkpointing": False,
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "save_strategy": "no",
        "warmup_steps": 0.05,
    }
    rows = [
        run(
            args.out / "sft",
            str(args.out / "model"),
            loss_type="sft",
            learning_rate=1e-3,
            num_train_epochs=args.sft_epochs,
            **common,
        )
    ]
    for loss in args.losses:
        for name, changes in SCHEDULES.items():
            rows.append(
                run(
                    args.out / f"{loss}-{name}",
                    str(args.out / "sft"),
                    loss_type=loss,
                    beta=BETA[loss],
                    learning_rate=5e-5,
                    num_train_epochs=args.epochs,
                    **common,
                    **changes,
                )
            )
    table = markdown(rows)
    (args.out / "table.md").write_text(table + "\n")
    (args.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n" + table)


def run(folder: Path, model: str, **settings: Any) -> dict[str, Any]:
    """One run; what the table says of it."""
    began = time.perf_counter()
    result = train(TrainConfig(model_name_or_path=model, output_dir=str(folder), **settings))
    lines = read_metrics(folder)
    steps = [line for line in lines if "grad_norm" in line]
    evaluations = [line for line in lines if "eval_loss" in line]
    return {
        "run": folder.name,
        "steps": result.steps,
        "seconds": time.perf_counter() - began,
        "first": steps[0],
        "last": steps[-1],
        "eval_first": evaluations[0],
        "eval_last": evaluations[-1],
        "updates": sum(line.get("event") == "reference_update" for line in lines),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    out = [
        "| run | steps | updates | held-out loss | training margin (first, last line) | held-out "
        "accuracy against "
        "the initial policy | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, last = row["eval_first"], row["eval_last"]
        margin = accuracy = ""
        if "rewards/margins" in row["last"]:
            margin = (
                f"{row['first']['rewards/margins']:+.3f} to {row['last']['rewards/margins']:+.3f}"
            )
            share, error = (
                last["eval_anchor/rewards/accuracies"],
                last["eval_anchor/rewards/accuracies_stderr"],
            )
            accuracy = f"{share:.3f} +- {error:.3f}"
        out.append(
            f"| {row['run']} | {row['steps']} | {row['updates']} | {first['eval_loss']:.3f} to "
            f"{last['eval_loss']:.3f} "
            f"| {margin} | {accuracy} | {row['seconds']:.0f} |"
        )
    return "\n".join(out)


if __name__ == "__main__":
    main()
