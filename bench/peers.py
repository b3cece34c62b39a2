"""fasttr and its peers on the same pairs, in the same order, with the same model: pairs per second,
memory, losses.

    python -m bench peers --data train.jsonl.gz --steps 8 --out runs/peers

Every provider runs through its own public trainer in its own process; they take turns, one
optimizer step each. The losses of every step must agree, at a learning rate that moves them; a
provider whose losses do not prints no number.

pairs_per_second counts, for every pair of a step: the step (median over the steps after warm-up),
the reference's scores of that pair (inside the step where the reference is live, the sweep ahead
divided over its steps where not), and the reference's moves, divided over all steps. Tokenising
stands apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.pairs import (
    MODELS,
    Rows,
    counted_tokens,
    generated_file,
    model_folder,
    read_file,
    survivors,
)
from bench.timing import Times, header

ROOT = Path(__file__).resolve().parents[1]
AGREE = 1e-3  # nats of loss, at every step
MOVED = 0.05  # how far the loss must go for the comparison to mean something
WARM_UP = 2  # steps
# The first of a group that ran is what the others are compared with.
GROUPS = (("trl-default", "trl-best", "fasttr"), ("trl-sync", "fasttr-soft"))
PROVIDERS = ("fasttr", "trl-default", "trl-best", "trl-sync", "fasttr-soft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="preference file, folder or hub id; none: generated pairs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="comma-separated")
    parser.add_argument("--batch", type=int, default=32, help="pairs per optimizer step")
    parser.add_argument("--model", help="model folder; none: random weights of --size")
    parser.add_argument("--size", choices=MODELS, default="10m")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument(
        "--max_tokens_per_batch", type=int, help="fasttr's pack; none: 1024 on a CPU, 8192 on a GPU"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--adam_epsilon", type=float, default=1e-8)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--trl_best_batch",
        type=int,
        help="per-device batch of trl-best; none: 1 on a CPU, 8 on a GPU",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="run on the CPU even when there is a GPU"
    )
    parser.add_argument(
        "--sequential", action="store_true", help="one provider after the other, for large models"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run, write peers.json and peers_detail.json into `args.out`, print the table, and return the
    former."""
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    wanted = args.providers.split(",")
    if unknown := sorted(set(wanted) - set(PROVIDERS)):
        raise SystemExit(
            f"--providers: got {', '.join(unknown)}; wanted some of {', '.join(PROVIDERS)}"
        )
    model, rows, data = _prepare(args, out)
    steps, batch = _fit(args, len(rows.rows))
    specs = {
        name: _spec(name, args, out, device, model, data, steps, batch, len(rows.rows))
        for name in wanted
    }
    absent = {name: why for name in wanted if (why := _absent(specs[name]["trainer"]))}
    for name, why in absent.items():
        print(f"{name}: absent, {why}", flush=True)
    runs, failed = _run(
        {name: spec for name, spec in specs.items() if name not in absent}, args.sequential
    )
    wrong = failed | _wrong({name: run["losses"] for name, run in runs.items()})
    tokens = counted_tokens(rows.trees) / len(rows.trees)
    providers, detail = {}, {}
    for name in wanted:
        if name in runs and name not in wrong:
            providers[name], detail[name] = _figures(specs[name], runs[name], tokens)
    environment = header("python -m bench " + " ".join(sys.argv[1:]))
    losses = {name: run["losses"] for name, run in runs.items()}
    result = {"providers": providers, "environment": environment}
    details = {
        "data": args.data or "generated pairs",
        "rows_read": rows.read,
        "pairs": len(rows.rows),
        "steps": steps,
        "pairs_per_step": batch,
        "device": str(device),
        "detail": detail,
        "absent": absent,
        "wrong": wrong,
        "losses": losses,
        "largest_difference": _differences(losses),
        "environment": environment,
        "loss_moved_by": {
            name: max(abs(x - math.log(2)) for x in found) for name, found in losses.items()
        },
    }
    (out / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "peers_detail.json").write_text(json.dumps(details, indent=1) + "\n")
    from bench.tables import peers_table

    print(peers_table(result, details))
    return result


def _prepare(args: argparse.Namespace, out: Path) -> tuple[str, Rows, str]:
    """The model's folder and a file of the surviving pairs that the run uses."""
    from fasttr.models.load import load_tokenizer

    wanted = args.steps * args.batch
    source = Path(args.data) if args.data else generated_file(out / "generated.jsonl", wanted + 64)
    model = args.model or str(model_folder(out, args.size, source))
    rows = survivors(read_file(str(source)), load_tokenizer(model), args.max_length, wanted)
    if not rows.rows:
        raise SystemExit(f"--data: no row of {source} can be trained on")
    usable = len(rows.rows) // args.batch * args.batch or len(rows.rows)
    rows = Rows(rows.rows[:usable], rows.trees[:usable], rows.read)
    path = out / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.rows))
    return model, rows, str(path)


def _fit(args: argparse.Namespace, rows: int) -> tuple[int, int]:
    batch = min(args.batch, rows)
    if rows < args.steps * batch:
        print(
            f"{rows} pairs survive: {args.steps} steps of {batch} pairs take "
            f"{args.steps * batch / rows:.2f} epochs"
        )
    return args.steps, batch


def _spec(
    name: str,
    args: argparse.Namespace,
    out: Path,
    device: torch.device,
    model: str,
    data: str,
    steps: int,
    batch: int,
    rows: int,
) -> dict[str, Any]:
    every = max(1, steps // 4)
    best = args.trl_best_batch or (1 if device.type == "cpu" else 8)
    default = {
        "gradient_checkpointing": args.gradient_checkpointing,
        "per_device_train_batch_size": math.gcd(8, batch),
    }
    packed = {
        "gradient_checkpointing": args.gradient_checkpointing,
        "max_tokens_per_batch": args.max_tokens_per_batch
        or (1024 if device.type == "cpu" else 8192),
        "use_liger_kernel": False,  # TRL's default too
    }
    settings = {
        "fasttr": packed,
        "fasttr-soft": packed
        | {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": every},
        "trl-default": default,
        "trl-best": default | {"per_device_train_batch_size": math.gcd(best, batch)},
        "trl-sync": default
        | {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": every},
    }[name]
    return {
        "trainer": name.partition("-")[0],
        "settings": settings,
        "model": model,
        "data": data,
        "rows": rows,
        "out": str(out / name),
        "steps": steps,
        "batch": batch,
        "max_length": args.max_length,
        "beta": 0.1,
        "seed": 42,
        "learning_rate": args.learning_rate,
        "adam_epsilon": args.adam_epsilon,
        "bf16": device.type == "cuda",
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
    }


def _absent(trainer: str) -> str | None:
    needs = ("trl", "datasets") if trainer == "trl" else ()
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)} (pip install trl==1.16.0)" if missing else None


class Worker:
    """A provider's process."""

    def __init__(self, name: str, spec: dict[str, Any]):
        out = Path(spec["out"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        self.log = out / "log.txt"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        # A cache of its own, thrown away before every run, so that tokenising is timed.
        fresh = {
            "PYTHONPATH": path,
            "HF_DATASETS_CACHE": str(out / "cache"),
            "HF_HUB_OFFLINE": "1",
            # Threads that spin while another process has the core multiply every time by what the
            # core is shared.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.peer_worker", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | fresh,
            )
        self.turns: list[dict[str, Any]] = []
        self.done: dict[str, Any] | None = None
        self.name = name

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            tail = self.log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(
                f"stopped with status {self.process.returncode}: {tail[0]} (see {self.log})"
            )
        return json.loads(line)

    def turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        heard = self.hear()
        if heard["kind"] == "done":
            self.done = heard
            self.process.wait()
        else:
            self.turns.append(heard)
            print(
                f"{self.name}: {heard['kind']}, turn {len(self.turns)}, {heard['seconds']:.2f} s",
                file=sys.stderr,
            )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _run(
    specs: dict[str, dict[str, Any]], sequential: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Turns and losses of each provider, and why a provider failed."""
    workers: list[Worker] = []
    failed: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}

    def attempt(worker: Worker, what: Any) -> None:
        try:
            what()
        except RuntimeError as error:
            failed[worker.name] = str(error)

    try:
        for batch in [[name] for name in specs] if sequential else [list(specs)]:
            started = []
            for name in batch:
                worker = Worker(name, specs[name])
                workers.append(worker)
                started.append(worker)
                attempt(worker, worker.hear)  # set up one after the other
            rounds = 0
            while running := [w for w in started if w.done is None and w.name not in failed]:
                for worker in running if rounds % 2 == 0 else reversed(running):
                    attempt(worker, worker.turn)
                rounds += 1
            found |= {w.name: {**w.done, "turns": w.turns} for w in started if w.done is not None}
    finally:
        for worker in workers:
            worker.stop()
    return found, failed


def _differences(losses: dict[str, list[float]]) -> dict[str, float]:
    """Largest difference of each provider's loss from its group's first, over the steps."""
    out = {}
    for group in GROUPS:
        here = [name for name in group if name in losses]
        for name in here[1:]:
            pairs = zip(losses[name], losses[here[0]], strict=False)
            equal = len(losses[name]) == len(losses[here[0]])
            out[name] = max((abs(a - b) for a, b in pairs), default=math.inf) if equal else math.inf
    return out


def _wrong(losses: dict[str, list[float]]) -> dict[str, str]:
    """Providers that may not print a number, and why."""
    wrong = {
        name: "the loss of step 1 is not log 2"
        for name, found in losses.items()
        if not found or not abs(found[0] - math.log(2)) <= AGREE
    }
    for name, difference in _differences(losses).items():
        if not difference <= AGREE:
            wrong.setdefault(
                name, f"losses differ by {difference:.2e} at some step; allowed {AGREE}"
            )
    return wrong


def _figures(
    spec: dict[str, Any], run: dict[str, Any], tokens_per_pair: float
) -> tuple[dict, dict]:
    steps = [turn for turn in run["turns"] if turn["kind"] == "step"]
    bare = [turn["seconds"] - sum(turn["parts"].values()) for turn in steps]
    warm = min(WARM_UP, len(bare) - 1)
    times = Times.of(bare[warm:])
    scoring = sum(t["seconds"] for t in run["turns"] if t["kind"] == "score")
    scoring += sum(turn["parts"].get("score", 0.0) for turn in steps)
    moving = sum(turn["parts"].get("move", 0.0) for turn in steps)
    # All of a step's processor time, its share of sweeps and moves included: what a loaded machine
    # does not stretch.
    cpu = sum(turn["cpu_seconds"] for turn in steps[warm:]) / len(steps[warm:])
    cpu += sum(t["cpu_seconds"] for t in run["turns"] if t["kind"] == "score") / len(steps)
    # A fixed reference is swept once; a step of a later epoch finds its scores there.
    per_step = times.median + (scoring + moving) / len(steps)
    rate = spec["batch"] / per_step
    tokenise = run["tokenise_seconds"] / spec["rows"]
    figures = {
        "settings": _stated(spec),
        "pairs_per_second": rate,
        "tokens_per_second": rate * tokens_per_pair,
        "peak_bytes": max(turn["peak_bytes"] for turn in run["turns"]),
        "losses": run["losses"],
    }
    detail = {
        "step": times.as_dict(),
        "warm_up_steps": warm,
        "step_seconds": bare,
        "score_s_per_step": scoring / len(steps),
        "move_s_per_step": moving / len(steps),
        "tokenise_s_per_pair": tokenise,
        "cpu_s_per_step": cpu,
        "pairs_per_second_with_tokenising": 1 / (1 / rate + tokenise),
    }
    return figures, detail


def _stated(spec: dict[str, Any]) -> dict[str, Any]:
    common = {
        "pairs_per_step": spec["batch"],
        "weights": "float32",
        "compute": "bfloat16" if spec["bf16"] else "float32",
        "optimizer": "adamw_torch_fused",
        "reference": "live" if spec["trainer"] == "trl" else "scored ahead",
    }
    keys = ("learning_rate", "adam_epsilon", "beta", "max_length", "seed", "device", "threads")
    return common | {key: spec[key] for key in keys} | spec["settings"]
