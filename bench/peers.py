"""fasttr and its peers on the same pairs, in the same order, with the same model: pairs per second,
memory, losses.

    python -m bench peers --data train.jsonl.gz --steps 8 --out runs/peers

Every provider runs through its own public trainer in its own process; they take turns, one
optimizer step each. The losses of every step must agree, at a learning rate that moves them; a
provider whose losses do not prints no number.

pairs_per_second counts, for every pair of a step: the step (median over the steps after warm-up),
the reference's log-probs of that pair (inside the step where the reference is live, the sweep ahead
divided over its steps where not), and the reference's moves, divided over all steps. Tokenising
stands apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import command_line
from bench.lengths import counted_tokens
from bench.pairs import Rows, drawn_file, generated_file, model_folder, read_file, survivors
from bench.peer_results import figures_of, peers_table, verdicts
from bench.shapes import SIZES
from bench.timing import header
from bench.turns import Turns
from fasttr.environment import device_for
from fasttr.files import write_json

PROVIDERS = ("fasttr", "trl-default", "trl-best", "trl-sync", "fasttr-soft")
# Only where asked for: the first compiles for a minute before its first step on a CPU, a GPU always
# does; the second is trl-default with fasttr.integrations.trl.
MORE_PROVIDERS = ("fasttr-compiled", "trl-patched")
AGREE = 1e-3  # nats of loss, at every step
# Log-probs of a completion from bf16 logits, as TRL has them, carry tenths of a nat of noise.
AGREE_BF16 = 2e-2
PROOF_STEPS = 3
DRAWN = ("hh", "ultrafeedback", "tldr")


@dataclass(frozen=True)
class Job:
    """What all providers of a run are given."""

    model: str
    data: str  # file of the pairs
    rows: int
    out: str
    steps: int
    batch: int  # pairs per optimizer step
    max_length: int
    learning_rate: float
    adam_epsilon: float
    bf16: bool
    device: str
    threads: int  # 0: torch's own choice
    beta: float = 0.1
    seed: int = 42


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        help="preference file; drawn:hh, drawn:ultrafeedback or drawn:tldr are "
        "random words with the lengths of those sets; none: generated pairs",
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated")
    parser.add_argument("--batch", type=int, default=32, help="pairs per optimizer step")
    parser.add_argument("--model", help="model folder; none: random weights of --size")
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument(
        "--max_tokens_per_batch",
        type=int,
        help="fasttr's pack, longer rows in parts; none: its default on a CPU, 8192 on a GPU",
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--fp32", action="store_true", help="compute in float32 on a GPU too")
    parser.add_argument(
        "--trl_best_batch",
        type=int,
        help="per-device batch of trl-best; none: 1 on a CPU, 8 on a GPU",
    )
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")
    parser.add_argument(
        "--sequential", action="store_true", help="one provider after the other, for large models"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run, write peers.json and peers_detail.json into `args.out`, print the table, and return the
    former."""
    args.out = args.out.resolve()
    wanted = args.providers.split(",")
    known = (*PROVIDERS, *MORE_PROVIDERS)
    if unknown := sorted(set(wanted) - set(known)):
        raise SystemExit(
            f"--providers: got {', '.join(unknown)}; wanted some of {', '.join(known)}"
        )
    device = device_for(args.cpu)
    rows, job = _prepare(args, device)
    absent = {name: why for name in wanted if (why := absent_because(name))}
    for name, why in absent.items():
        print(f"{name}: absent, {why}", flush=True)
    present = [name for name in wanted if name not in absent]
    proof = _proof_in_fp32(args, present) if job.bf16 else None
    specs = {name: _spec(name, args, job) for name in present}
    turns = Turns()
    turns.run(specs, sequential=args.sequential)
    losses = {name: run["losses"] for name, run in turns.found.items()}
    verdict = verdicts(losses, AGREE_BF16 if job.bf16 else AGREE)
    wrong = turns.failed | ({} if proof is None else proof["wrong"]) | verdict.wrong
    tokens = counted_tokens(rows.trees) / len(rows.trees)
    good = [name for name in wanted if name in turns.found and name not in wrong]
    figures = {name: figures_of(specs[name], turns.found[name], tokens) for name in good}
    environment = header(command_line())
    result = {
        "providers": {name: one.figures for name, one in figures.items()},
        "environment": environment,
    }
    details = {
        "data": args.data or "generated pairs",
        "rows_read": rows.read,
        "pairs": len(rows.rows),
        "steps": job.steps,
        "pairs_per_step": job.batch,
        "size": args.size,
        "device": str(device),
        "detail": {name: one.detail for name, one in figures.items()},
        "absent": absent,
        "wrong": wrong,
        "losses": losses,
        "largest_difference": verdict.differences,
        "proof_in_fp32": proof,
        "environment": environment,
        "loss_moved_by": {
            name: max(abs(loss - math.log(2)) for loss in found) for name, found in losses.items()
        },
    }
    write_json(args.out / "peers.json", result)
    write_json(args.out / "peers_detail.json", details)
    print(peers_table(result, details), flush=True)
    return result


def _prepare(args: argparse.Namespace, device: torch.device) -> tuple[Rows, Job]:
    """The surviving pairs of a run, in a file of their own, and what every provider is given."""
    from fasttr.models.load import load_tokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.steps * args.batch
    source = _source(args, wanted + 64)
    model = args.model or str(model_folder(args.out, args.size, source, device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights were drawn here, and are the providers' now
    rows = survivors(read_file(str(source)), load_tokenizer(model), args.max_length, wanted)
    if not rows.rows:
        raise SystemExit(f"--data: no row of {source} can be trained on")
    batch = min(args.batch, len(rows.rows))
    usable = len(rows.rows) // batch * batch
    rows = Rows(rows.rows[:usable], rows.trees[:usable], rows.read)
    if usable < args.steps * batch:
        epochs = args.steps * batch / usable
        print(f"{usable} pairs survive: {args.steps} steps of {batch} take {epochs:.2f} epochs")
    path = args.out / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.rows))
    return rows, Job(
        model=model,
        data=str(path),
        rows=len(rows.rows),
        out=str(args.out),
        steps=args.steps,
        batch=batch,
        max_length=args.max_length,
        learning_rate=args.learning_rate,
        adam_epsilon=args.adam_epsilon,
        bf16=device.type == "cuda" and not args.fp32,
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _source(args: argparse.Namespace, rows: int) -> Path:
    """The file that pairs are read from."""
    if args.data is None:
        return generated_file(args.out / "generated.jsonl", rows)
    if args.data.removeprefix("drawn:") in DRAWN:
        return drawn_file(args.out / "drawn.jsonl", args.data.removeprefix("drawn:"), rows)
    return Path(args.data)


def _proof_in_fp32(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """A short run of a tiny model in float32 on the same device: that the trainers compute the same
    is shown there, since bf16 leaves room for more than a mistake."""
    small = argparse.Namespace(**vars(args))
    small.out = args.out / "proof"
    small.size, small.model, small.data = "tiny", None, None
    small.steps, small.batch, small.fp32 = PROOF_STEPS, 8, True
    small.learning_rate = 1e-3
    _, job = _prepare(small, device_for(args.cpu))
    turns = Turns()
    turns.run({name: _spec(name, small, job) for name in names}, sequential=False)
    losses = {name: run["losses"] for name, run in turns.found.items()}
    verdict = verdicts(losses, AGREE)
    reasons = turns.failed | verdict.wrong
    return {
        "losses": losses,
        "largest_difference": verdict.differences,
        "wrong": {name: f"in float32, tiny: {why}" for name, why in reasons.items()},
    }


def _spec(name: str, args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What a provider's process is told."""
    return {
        **dataclasses.asdict(job),
        "trainer": name.partition("-")[0],
        "settings": _settings(name, args, job),
        "out": str(Path(job.out) / name),
    }


def _settings(name: str, args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The settings of a provider, in its own trainer's names."""
    every = max(1, job.steps // 4)
    on_cpu = job.device == "cpu"
    best = args.trl_best_batch or (1 if on_cpu else 8)
    checkpointing = {"gradient_checkpointing": args.gradient_checkpointing}
    packed = checkpointing | {"use_liger_kernel": False}  # TRL's default too
    if args.max_tokens_per_batch or not on_cpu:
        packed["max_tokens_per_batch"] = args.max_tokens_per_batch or 8192
    default = checkpointing | {"per_device_train_batch_size": math.gcd(8, job.batch)}
    match name:
        case "fasttr":
            return packed
        case "fasttr-compiled":
            return packed | {"compile": True}
        case "fasttr-soft":
            soft = {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": every}
            return packed | soft
        case "trl-best":
            return default | {"per_device_train_batch_size": math.gcd(best, job.batch)}
        case "trl-patched":
            return default | {"patched": True}
        case "trl-sync":
            return default | {
                "sync_ref_model": True,
                "ref_model_mixup_alpha": 0.6,
                "ref_model_sync_steps": every,
            }
        case _:
            return default


def absent_because(name: str) -> str | None:
    needs = ("trl", "datasets") if name.startswith("trl") else ()
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)} (pip install trl==1.16.0)" if missing else None
