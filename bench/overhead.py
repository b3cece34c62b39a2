"""What is not compute: the trainer's own time per step, and tokenising and planning of many pairs.

    python -m bench overhead --pairs 64 --rows 100000

Own time is a step (planning, packing, statistics, logging) minus what runs inside the model's
forward, the backward, the gradient's norm and the optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.pairs import generated_file, model_folder
from bench.timing import Times, header, process_peak_bytes
from fasttr import Callback


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=64, help="pairs per step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--rows", type=int, default=100_000, help="pairs to tokenise and plan; 0: none"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--encode_only", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> dict[str, Any]:
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.encode_only:
        print(json.dumps(_encode(args)))
        return {}
    result: dict[str, Any] = {
        "cases": [],
        "environment": header("python -m bench " + " ".join(sys.argv[1:])),
    }
    missing = [p for p in ("datasets",) if importlib.util.find_spec(p) is None]
    cases = [("own time of a step", lambda: own_time(args))]
    if args.rows:
        cases.append((f"{args.rows:,} pairs", lambda: many_rows(args)))
    for what, measure in cases:
        absent = {"fasttr": f"not installed: {', '.join(missing)}"} if missing else {}
        one = {"what": what, "figures": {} if missing else measure(), "absent": absent, "wrong": {}}
        result["cases"].append(one)
        (args.out / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")
        from bench.tables import overhead_table

        print(overhead_table(one) + "\n", flush=True)
    return result


def own_time(args: argparse.Namespace) -> dict[str, Any]:
    """`fasttr.train` on a model so small that compute is negligible."""
    from fasttr import TrainConfig, train

    data = generated_file(args.out / "generated.jsonl", args.pairs * args.steps)
    folder = model_folder(args.out, "tiny", data)
    clock = StepClock()
    with (
        tempfile.TemporaryDirectory() as cache,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        clock.watching_compute(),
    ):
        config = TrainConfig(
            model_name_or_path=str(folder),
            dataset_name=str(data),
            output_dir=str(Path(cache) / "run"),
            train_batch_size=args.pairs,
            max_steps=args.steps,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
        )
        train(config, callbacks=[clock])
    whole = np.diff(clock.ends, axis=0)
    own = whole - np.diff(clock.computing, axis=0)
    warm = min(3, len(own) - 1)
    times, worked = (Times.of(own[warm:, column].tolist()) for column in (0, 1))
    return {
        f"own time of a step of {args.pairs} pairs, median": (times.median * 1e3, "ms"),
        "its 20th and 80th percentiles": (times.p20 * 1e3, f"to {times.p80 * 1e3:.4g} ms"),
        "its processor time, median": (worked.median * 1e3, "ms"),
        "whole step, median": (float(np.median(whole[warm:, 0])) * 1e3, "ms"),
    }


class StepClock(Callback):
    """When each step ended, and how much of the time until then was compute.

    Wall time, and this thread's processor time: what a loaded machine does not stretch.
    """

    def __init__(self) -> None:
        self.ends: list[np.ndarray] = []
        self.computing: list[np.ndarray] = []
        self._inside = np.zeros(2)

    def on_step(self, run: Any, metrics: Any) -> None:
        self.ends.append(self._now())
        self.computing.append(self._inside.copy())

    @contextlib.contextmanager
    def watching_compute(self) -> Iterator[None]:
        """Within, the forward, the backward, the norm and the optimizer are timed."""
        from fasttr.models.packed import PackedModel

        watched = [
            (PackedModel, "forward"),
            (torch.Tensor, "backward"),
            (torch.optim.AdamW, "step"),
            (torch.nn.utils, "get_total_norm"),
            (torch.nn.utils, "clip_grads_with_norm_"),
        ]
        before = [getattr(owner, name) for owner, name in watched]
        for (owner, name), function in zip(watched, before, strict=True):
            setattr(owner, name, self._timed(function))
        try:
            yield
        finally:
            for (owner, name), function in zip(watched, before, strict=True):
                setattr(owner, name, function)

    def _timed(self, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = self._now()
            out = function(*args, **kwargs)
            self._inside += self._now() - began
            return out

        return call

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.perf_counter(), time.thread_time()])


def many_rows(args: argparse.Namespace) -> dict[str, Any]:
    """Tokenise and plan in processes of their own: with few rows and with many, and again from the
    cache."""
    generated_file(args.out / f"rows-{args.rows}.jsonl", args.rows)
    few = max(args.rows // 10, 1)
    generated_file(args.out / f"rows-{few}.jsonl", few)
    with tempfile.TemporaryDirectory() as cache:
        runs = [_encode_apart(args, rows, cache) for rows in (few, args.rows, args.rows)]
    return {
        "tokenise and index": (runs[1]["tokenise"], "s"),
        "again, from the cache": (runs[2]["tokenise"], "s"),
        "plan and pack one epoch": (runs[1]["plan"], "s"),
        "memory grown by": (runs[1]["grown"] / 2**20, "MiB"),
        f"memory grown by, {few:,} pairs": (runs[0]["grown"] / 2**20, "MiB"),
    }


def _encode_apart(args: argparse.Namespace, rows: int, cache: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "bench",
        "overhead",
        "--encode_only",
        "--rows",
        str(rows),
        "--out",
        str(args.out),
    ]
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_DATASETS_CACHE": cache, "PYTHONPATH": path},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _encode(args: argparse.Namespace) -> dict[str, float]:
    import datasets  # noqa: F401  # its own memory is not the rows'

    from fasttr.data.load import DataConfig, load_trees
    from fasttr.models.load import load_tokenizer
    from fasttr.packing.plan import Plan

    data = args.out / f"rows-{args.rows}.jsonl"
    tokenizer = load_tokenizer(str(model_folder(args.out, "tiny", data)))
    tokenizer(["warm up"])
    before, began = process_peak_bytes(torch.device("cpu")), time.perf_counter()
    trees = load_trees(tokenizer, DataConfig(name=str(data)))
    tokenised = time.perf_counter()
    plan = Plan(trees, train_batch_size=args.pairs, max_tokens_per_batch=8192)
    packs = sum(len(plan.packs(step)) for step in range(plan.total_steps))
    assert packs > 0
    return {
        "tokenise": tokenised - began,
        "plan": time.perf_counter() - tokenised,
        "grown": process_peak_bytes(torch.device("cpu")) - before,
    }
