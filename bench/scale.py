"""How a run lies on many processes, by simulation: what of the ideal its steps reach, what planning
costs a process, and how large tables become. No process is started and nothing is sent.

    python -m bench scale --data FILE

Lengths are log-normal, close to those of the data sets that they are named for; with a file they
are its own texts, at 4 characters a token. The share of the ideal is the mean work of a rank, in
tokens, over that of the dearest one, which the others wait for: once a step where every rank has
the whole weights, in every micro-step where they are divided. Beside it stands the processor time
that one rank takes to plan a step, in ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bench.harness import Benchmark, Case
from bench.lengths import LENGTHS, LONGEST, Lengths
from bench.pairs import read_file
from bench.text import titled
from fasttr.packing.layout import balanced_bins, first_fit_decreasing
from fasttr.packing.plan import Plan
from fasttr.packing.shares import balance, even_shares, lockstep_balance, micro_steps
from fasttr.packing.tiers import tree_sizes
from fasttr.reference.logp_table import LogpTable

WORLDS = (8, 16, 64, 256, 1024)
ROWS_OF_RANK = (2, 8, 16)
STEPS = 4
BUDGET = 8192  # tokens of a pack
CHARACTERS = 4  # of a token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="file of preference rows, for their lengths")
    parser.add_argument("--rows", type=int, default=10_000_000, help="of the tables")
    parser.add_argument("--worlds", default=",".join(map(str, WORLDS)))
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    parser.add_argument("--cpu", action="store_true", help="without effect: no device is used")


class OnlyLengths:
    """Pairs of which nothing but the lengths is there."""

    prompt_skips = None
    largest_id = 0

    def __init__(self, prompts: np.ndarray, completions: np.ndarray):
        self.prompt_lengths = prompts
        self.completion_lengths = completions
        self.positions = np.arange(len(prompts))
        self.fingerprint = f"lengths of {len(prompts)} pairs"

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, row: int) -> Any:
        raise IndexError("only the lengths of these pairs are there")


def drawn(lengths: Lengths, rows: int, seed: int = 0) -> OnlyLengths:
    """Pairs of a distribution, cut as `bench.lengths.make_trees` cuts them."""
    rng = np.random.default_rng(seed)

    def draw(distribution: Any, shape: tuple[int, ...]) -> np.ndarray:
        found = rng.lognormal(np.log(distribution.median), distribution.spread, shape)
        return found.astype(np.int64)

    prompts = draw(lengths.prompt, (rows,)).clip(2, LONGEST // 2)
    completions = draw(lengths.completion, (rows, 2)).clip(2, (LONGEST - prompts)[:, None])
    return OnlyLengths(prompts.astype(np.int32), completions.astype(np.int32))


def of_file(name: str) -> OnlyLengths:
    """The pairs of a file, by the characters of their texts."""
    prompts, completions = [], []
    for row in read_file(name):
        prompts.append(len(str(row.get("prompt", ""))) // CHARACTERS)
        sides = [len(str(row[side])) // CHARACTERS for side in ("chosen", "rejected")]
        completions.append(sides)
    completion_lengths = np.clip(np.array(completions), 1, LONGEST)
    return OnlyLengths(
        np.clip(np.array(prompts), 1, LONGEST).astype(np.int32),
        completion_lengths.astype(np.int32),
    )


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    sources = {name: drawn(LENGTHS[name], 1 << 17) for name in ("hh", "ultrafeedback")}
    if args.data:
        sources[Path(args.data).resolve().parent.name] = of_file(args.data)
    worlds = [int(world) for world in args.worlds.split(",")]
    for name, trees in sources.items():
        yield {"what": f"shares, {name}", "rows": shares(trees, worlds), **_RIGHT}
    for name, trees in sources.items():
        yield {"what": f"packs, {name}", "rows": packs(trees), **_RIGHT}
    yield {"what": f"tables of {args.rows:,} pairs", "rows": tables_of(args.rows), **_RIGHT}


_RIGHT: dict[str, Any] = {"wrong": {}, "absent": {}}


def shares(trees: OnlyLengths, worlds: list[int]) -> list[dict[str, Any]]:
    """Share of the ideal and processor time of planning, by ranks and rows a rank."""
    found = []
    for world in worlds:
        for rows_of_rank in ROWS_OF_RANK:
            batch = world * rows_of_rank
            if batch > len(trees):
                continue
            plan = Plan(trees, train_batch_size=batch, max_tokens_per_batch=BUDGET, max_steps=STEPS)
            plan.rows(0)  # an epoch's permutation is drawn once
            whole, lockstep, seconds, lockstep_seconds = [], [], [], []
            for step in range(STEPS):
                began = time.thread_time()
                rows = plan.rows(step)
                sizes = tree_sizes(trees, rows)
                mine = even_shares(sizes.tolist(), world)[world // 2]
                balanced_bins(sizes[mine].tolist(), BUDGET)
                planned = time.thread_time()
                micro_steps(sizes.tolist(), world, BUDGET)
                lockstep_seconds.append(time.thread_time() - planned)
                seconds.append(planned - began)
                whole.append(balance(sizes.tolist(), world))
                lockstep.append(lockstep_balance(sizes.tolist(), world, BUDGET))
            found.append(
                {
                    "world": world,
                    "rows_of_rank": rows_of_rank,
                    "whole": {
                        "share_of_ideal": float(np.mean(whole)),
                        "planning_s": float(np.median(seconds)),
                    },
                    "divided": {
                        "share_of_ideal": float(np.mean(lockstep)),
                        "planning_s": float(np.median(lockstep_seconds)),
                    },
                }
            )
    return found


def packs(trees: OnlyLengths) -> list[dict[str, Any]]:
    """Greedy packs and balanced ones: the largest, and the smallest as a share of it."""
    found = []
    for batch, budget in ((64, 8192), (64, 16384), (256, 16384)):
        if batch > len(trees):
            continue
        plan = Plan(trees, train_batch_size=batch, max_tokens_per_batch=budget, max_steps=200)
        of: dict[str, list[list[int]]] = {"greedy": [], "balanced": []}
        steps = min(plan.total_steps, plan.steps_per_epoch)
        for step in range(steps):
            sizes = tree_sizes(trees, plan.rows(step))
            for name, make in (("greedy", first_fit_decreasing), ("balanced", balanced_bins)):
                bins = make(sizes.tolist(), budget)
                of[name].append([int(sizes[members].sum()) for members in bins])
        row: dict[str, Any] = {"pairs": batch, "budget": budget, "steps": steps}
        for name, of_steps in of.items():
            largest = [max(loads) for loads in of_steps]
            row[name] = {
                "packs": float(np.mean([len(loads) for loads in of_steps])),
                "peak_tokens": float(np.mean(largest)),
                "smallest_over_largest": float(
                    np.mean([min(loads) / max(loads) for loads in of_steps])
                ),
            }
        found.append(row)
    return found


def tables_of(rows: int) -> list[dict[str, Any]]:
    """Sizes on the host and on disk, and the processor time of what a process does with them."""
    trees = drawn(LENGTHS["hh"], rows)
    plan = Plan(trees, train_batch_size=1024, max_tokens_per_batch=BUDGET)
    table = LogpTable(rows, 2)
    found = [
        _figure("lengths in memory", nbytes=_nbytes(trees)),
        _figure("log-probs in memory", nbytes=table.values.nbytes),
        _figure("an epoch's order, once an epoch", of=lambda: plan.rows(0)),
        _figure("rows of a later step", of=lambda: plan.rows(7)),
        _figure("a window's table made empty", of=table.clear),
        _figure("which rows are known, once a window", of=table.known_rows),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.safetensors"
        values = torch.from_numpy(np.zeros_like(table.values))
        figure = _figure(
            "log-probs in a checkpoint", of=lambda: save_file({"scores": values}, path)
        )
        found.append({**figure, "bytes": path.stat().st_size})
    return found


def _figure(what: str, nbytes: int | None = None, of: Any = None) -> dict[str, Any]:
    began = time.thread_time()
    if of is not None:
        of()
    seconds = None if of is None else time.thread_time() - began
    return {"what": what, "bytes": nbytes, "seconds": seconds}


def _nbytes(trees: OnlyLengths) -> int:
    return trees.prompt_lengths.nbytes + trees.completion_lengths.nbytes


def table(case: Case) -> str:
    kind = case["what"].split(",")[0].split(" ")[0]
    return titled(case["what"], *_TABLES[kind](case["rows"]))


def _shares_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ["ranks"]
    columns += [f"{n} pairs a rank" for n in ROWS_OF_RANK]
    lines = []
    for world in dict.fromkeys(row["world"] for row in rows):
        of_world = {row["rows_of_rank"]: row for row in rows if row["world"] == world}
        cells = []
        for rows_of_rank in ROWS_OF_RANK:
            row = of_world.get(rows_of_rank)
            found = [] if row is None else [row["whole"], row["divided"]]
            told = [f"{one['share_of_ideal']:.3f}, {one['planning_s'] * 1e3:.2g}" for one in found]
            cells.append("; ".join(told))
        lines.append([str(world), *cells])
    return columns, lines


def _packs_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    columns = ["pairs, tokens a pack", "packs", "peak tokens", "smallest over largest pack"]
    lines = []
    for row in rows:
        greedy, balanced = row["greedy"], row["balanced"]
        lines.append(
            [
                f"{row['pairs']}, {row['budget']:,}",
                f"{greedy['packs']:.2f} -> {balanced['packs']:.2f}",
                f"{greedy['peak_tokens']:,.0f} -> {balanced['peak_tokens']:,.0f}",
                f"{greedy['smallest_over_largest']:.2f} -> {balanced['smallest_over_largest']:.2f}",
            ]
        )
    return columns, lines


def _tables_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.0f} MiB"
        seconds = "" if row["seconds"] is None else f"{row['seconds'] * 1e3:.3g} ms"
        lines.append([row["what"], size, seconds])
    return ["what", "size", "processor time"], lines


_TABLES = {"shares": _shares_table, "packs": _packs_table, "tables": _tables_table}

BENCHMARK = Benchmark(name="scale", title="Many processes, simulated", cases=cases, table=table)
