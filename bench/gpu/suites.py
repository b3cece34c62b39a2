"""The parts that are benchmarks of their own, run at the sizes of the plan."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from bench import head as head_benchmark
from bench import layer as layer_benchmark
from bench import lerp as lerp_benchmark
from bench import optim as optim_benchmark
from bench import peers as peers_benchmark
from bench import report
from bench import step as step_benchmark
from bench.gpu.notes import Task
from bench.gpu.predictions import LAYER_TOKENS
from bench.harness import parsed


def _arguments(module: ModuleType, task: Task, *given: str) -> argparse.Namespace:
    return parsed(module, *given, "--out", str(task.out), *(["--cpu"] if task.dry else []))


def _run(module: ModuleType, task: Task, *given: str) -> list[dict[str, Any]]:
    """Run a benchmark, keep its JSON and its picture; its cases."""
    benchmark = module.BENCHMARK
    result = benchmark.run(_arguments(module, task, *given))
    task.notes.keep(task.out / f"{benchmark.name}.json")
    _draw(task, benchmark.name, result)
    for case in result["cases"]:
        for name, why in case["wrong"].items():
            task.notes.check(f"{name} is right", False, why)
        for name, why in case["absent"].items():
            if why.startswith(("not ", "failed", "needs a GPU")):
                task.notes.lacks(f"{name}: {why}")
    return result["cases"]


def _draw(task: Task, name: str, result: dict[str, Any]) -> None:
    if task.dry:
        return
    plots = list(report.bars(name, result))
    if plots:
        report.draw(plots, task.out / f"{name}.png")


def layer(task: Task) -> None:
    given = ["--archs", "llama-3-8b,pythia-2.8b", "--tokens", str(LAYER_TOKENS)]
    if task.dry:
        given = ["--archs", "tiny", "--tokens", "96", "--lengths", "tiny"]
        given += ["--seconds", "0.05", "--compile_backend", "eager"]
    for case in _run(layer_benchmark, task, *given):
        for mode, row in case["modes"].items():
            what = f"{case['arch']}, {mode}"
            task.notes.figure(f"{what}, forward", row["forward_s"] * 1e3, "ms")
            task.notes.figure(f"{what}, backward", row["backward_s"] * 1e3, "ms")
            task.notes.figure(f"{what}, kept, D bytes a token", row["kept_in_D_bytes_a_token"])
            total = sum(kind["ms"] for kind in row["kinds"].values())
            gather = row["kinds"].get("gather", {"ms": 0.0})["ms"]
            task.notes.figure(f"{what}, gather's share", gather / max(total, 1e-9))


def head(task: Task) -> None:
    given = ["--shapes", "llama-3-8b,pythia-2.8b", "--tokens", "8192", "--inputs", "peaked"]
    given += ["--reference", "with", "--leaves", "bf16,fp32-autocast-later", "--seconds", "4"]
    if task.dry:
        given = ["--shapes", "tiny", "--tokens", "64", "--inputs", "peaked", "--reference", "with"]
        given += ["--leaves", "fp32-later", "--seconds", "0.05"]
        given += ["--providers", "fasttr,fasttr into .grad,eager,TRL,QuACK"]
    for case in _run(head_benchmark, task, *given):
        what = f"{case['shape']}, {case['leaf']}"
        rows = case["providers"]
        if "fasttr" not in rows:
            continue
        ours = rows["fasttr"]
        task.notes.figure(f"{what}, fasttr, ms", ours["median_s"] * 1e3, "ms")
        share = ours["share_of_bare_products"]
        task.notes.figure(f"{what}, fasttr, share of bare products", share)
        for peer in ("TRL", "Liger chunked DPO"):
            if peer in rows:
                ratio = rows[peer]["median_s"] / ours["median_s"]
                task.notes.figure(f"{what}, over {peer}", ratio, "x")


def lerp(task: Task) -> None:
    given = ["--models", "llama-3.2-1b,llama-3-8b", "--seconds", "2"]
    if task.dry:
        given = ["--models", "tiny", "--seconds", "0.02"]
    shares: dict[str, list[float]] = {}
    for case in _run(lerp_benchmark, task, *given):
        own = [row for name, row in case["providers"].items() if name.startswith("fasttr")]
        shares.setdefault(case["model"], []).extend(row["share_of_copy"] for row in own)
    for model, found in shares.items():
        task.notes.figure(f"{model}, least share of the copy", min(found))


def step(task: Task) -> None:
    given = ["--lengths", "hh,tldr", "--size", "1b", "--pairs", "64", "--seconds", "12"]
    if task.dry:
        given = ["--lengths", "tiny", "--size", "tiny", "--pairs", "4", "--seconds", "0.02"]
        given += ["--least", "1", "--settings", ",".join(step_benchmark.LINES[:6])]
    for case in _run(step_benchmark, task, *given):
        rates = {name: row["pairs_per_second"] for name, row in case["settings"].items()}
        for name in rates:
            ratio = rates[name] / rates[next(iter(rates))]
            task.notes.figure(f"{case['lengths']}, {name}, over the first line", ratio, "x")


def peers1b(task: Task) -> None:
    _peers(task, "1b")


def peers3b(task: Task) -> None:
    _peers(task, "3b", "--gradient_checkpointing")


def _peers(task: Task, size: str, *more: str) -> None:
    given = ["--data", "drawn:hh", "--size", size, "--batch", "64", "--steps", "6", "--sequential"]
    if task.dry:
        given = ["--size", "tiny", "--batch", "4", "--steps", "3", "--learning_rate", "1e-2"]
        # Two sizes differ in nothing here: the second one shows that it starts.
        given += ["--providers", "fasttr,trl-best" if size == "1b" else "fasttr"]
        given += ["--max_length", "64"]
        given += ["--data", str(_lopsided_pairs(task.out / "lopsided.jsonl"))]
    result = peers_benchmark.main(_arguments(peers_benchmark, task, *given, *more))
    detail = json.loads((task.out / "peers_detail.json").read_text())
    task.notes.keep(task.out / "peers.json")
    task.notes.keep(task.out / "peers_detail.json")
    _draw(task, "peers", result)
    for name, why in detail["absent"].items():
        task.notes.lacks(f"{name}: {why}")
    for name, why in detail["wrong"].items():
        task.notes.check(f"{name} computes the same", False, why)
    rates = {name: row["pairs_per_second"] for name, row in result["providers"].items()}
    for name, row in result["providers"].items():
        task.notes.figure(f"{name}, pairs/s", rates[name], "pairs/s")
        task.notes.figure(f"{name}, peak", row["peak_bytes"] / 2**30, "GiB")
        if name.startswith("trl") and "fasttr" in rates:
            task.notes.figure(f"over {name}", rates["fasttr"] / rates[name], "x")


def _lopsided_pairs(path: Path) -> Path:
    """Sides that differ in every row alike, so that the loss moves within a few steps."""
    rows = [
        {
            "prompt": f"question {i}?",
            "chosen": " good" * (i % 5 + 3),
            "rejected": " bad" * (i % 4 + 3),
        }
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def optim(task: Task) -> None:
    given = ["--models", "llama-3-8b-layer,llama-3.2-1b", "--seconds", "2"]
    if task.dry:
        given = ["--models", "tiny", "--seconds", "0.02", "--providers", "fasttr,torch f"]
    for case in _run(optim_benchmark, task, *given):
        for name, row in case["providers"].items():
            what = f"{case['model']}, {name.removeprefix('fasttr, ')}, share of the copy"
            task.notes.figure(what, row["share_of_copy"])
