"""What is not compute: the trainer's own time per step, and tokenising and planning of many pairs.

    python -m bench overhead --pairs 64 --rows 100000

Own time is a step (planning, packing, statistics, logging) minus what runs inside the model's
forward, the backward and the update of the weights.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import Benchmark, Case
from bench.pairs import generated_file, model_folder
from bench.text import reasons, titled
from bench.timing import Times, process_peak_bytes
from fasttr import Callback

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=64, help="pairs per step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--rows", type=int, default=100_000, help="pairs to tokenise and plan; 0: none"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/overhead"))
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    measures: dict[str, Callable[[], Figures]] = {
        "own time of a step": lambda: own_time(args, device)
    }
    if args.rows:
        measures[f"{args.rows:,} pairs"] = lambda: many_rows(args)
    missing = importlib.util.find_spec("datasets") is None
    for what, measure in measures.items():
        absent = {"fasttr": "not installed: datasets"} if missing else {}
        figures = {} if missing else measure()
        yield {"what": what, "figures": figures, "absent": absent, "wrong": {}}


Figures = dict[str, tuple[float, str]]  # what -> (value, unit)


def own_time(args: argparse.Namespace, device: torch.device) -> Figures:
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
            use_cpu=device.type == "cpu",
            gradient_checkpointing=False,
        )
        train(config, callbacks=[clock])
    return clock.figures(args.pairs)


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

    def figures(self, pairs: int) -> Figures:
        whole = np.diff(self.ends, axis=0)
        own = whole - np.diff(self.computing, axis=0)
        warm = min(WARM_UP, len(own) - 1)
        times = Times.of(own[warm:, 0].tolist())
        worked = Times.of(own[warm:, 1].tolist())
        return {
            f"own time of a step of {pairs} pairs, median": (times.median * 1e3, "ms"),
            "its 20th and 80th percentiles": (times.p20 * 1e3, f"to {times.p80 * 1e3:.4g} ms"),
            "its processor time, median": (worked.median * 1e3, "ms"),
            "whole step, median": (float(np.median(whole[warm:, 0])) * 1e3, "ms"),
        }

    @contextlib.contextmanager
    def watching_compute(self) -> Iterator[None]:
        """Within, the forward, the backward and the update of the weights are timed."""
        from fasttr.models.packed import PackedModel
        from fasttr.training import step

        watched = [(PackedModel, "forward"), (torch.Tensor, "backward"), (step, "update")]
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


def many_rows(args: argparse.Namespace) -> Figures:
    """Tokenise and plan in processes of their own: with few rows and with many, and again from the
    cache."""
    few = max(args.rows // 10, 1)
    for rows in (few, args.rows):
        generated_file(_rows_file(args.out, rows), rows)
    with tempfile.TemporaryDirectory() as cache:
        of_few = _encode_apart(args, few, cache)
        first = _encode_apart(args, args.rows, cache)
        again = _encode_apart(args, args.rows, cache)
    return {
        "tokenise and index": (first["tokenise"], "s"),
        "again, from the cache": (again["tokenise"], "s"),
        "plan and pack one epoch": (first["plan"], "s"),
        "memory grown by": (first["grown"] / 2**20, "MiB"),
        f"memory grown by, {few:,} pairs": (of_few["grown"] / 2**20, "MiB"),
    }


def _rows_file(out: Path, rows: int) -> Path:
    return out / f"rows-{rows}.jsonl"


def _encode_apart(args: argparse.Namespace, rows: int, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.overhead", str(args.out), str(rows), str(args.pairs)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_DATASETS_CACHE": cache, "PYTHONPATH": path},
    )
    return json.loads(done.stdout.splitlines()[-1])


def encode(out: Path, rows: int, pairs: int) -> dict[str, float]:
    """Seconds to tokenise and to plan a file of `rows` pairs, and bytes that this process grew
    by."""
    import datasets  # noqa: F401  # its own memory is not the rows'

    from fasttr.data.load import DataConfig, load_trees
    from fasttr.models.load import load_tokenizer
    from fasttr.packing.plan import Plan

    cpu = torch.device("cpu")
    data = _rows_file(out, rows)
    tokenizer = load_tokenizer(str(model_folder(out, "tiny", data)))
    tokenizer(["warm up"])
    before = process_peak_bytes(cpu)
    began = time.perf_counter()
    trees = load_trees(tokenizer, DataConfig(name=str(data)))
    tokenised = time.perf_counter()
    plan = Plan(trees, train_batch_size=pairs, max_tokens_per_batch=8192)
    packs = sum(len(plan.packs(step)) for step in range(plan.total_steps))
    assert packs > 0
    return {
        "tokenise": tokenised - began,
        "plan": time.perf_counter() - tokenised,
        "grown": process_peak_bytes(cpu) - before,
    }


def table(case: Case) -> str:
    rows = [[name, f"{value:.4g} {unit}"] for name, (value, unit) in case["figures"].items()]
    return titled(case["what"], ("figure", "value"), rows + reasons(case, 2))


BENCHMARK = Benchmark(name="overhead", title="What is not compute", cases=cases, table=table)


if __name__ == "__main__":
    print(json.dumps(encode(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
