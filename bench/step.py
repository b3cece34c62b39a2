"""One optimizer step, and what each part of fasttr brings to it: an ablation from padded batches to
the trainer.

    python -m bench step --lengths hh,ultrafeedback,tldr --size 10m

Each line keeps what the line above it has. Rows, weights, optimizer and dtype are the same; the
loss and the gradient's norm must equal those of the padded baseline before a line gets a number.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from bench.ablation import Ablation, Step
from bench.baselines import packed_shared
from bench.harness import Bars, Benchmark, Case, Contender, add_common_arguments, compare
from bench.lengths import LENGTHS, counted_tokens, make_trees
from bench.shapes import SHAPES, SIZES
from bench.text import mib, reasons, spread, titled
from bench.timing import Times, process_peak_bytes
from fasttr.metrics.throughput import FlopCount, peak_flops

LINES = (
    "padded",
    "packed",
    "prefix sharing",
    "completion-only head",
    "fused loss",
    "window cache",
    "liger norms",
    "compile",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--lengths", default="hh,ultrafeedback,tldr")
    parser.add_argument("--size", choices=SIZES, default="1b" if gpu else "10m")
    parser.add_argument("--pairs", type=int, default=64 if gpu else 16, help="pairs per step")
    parser.add_argument(
        "--padded_batch", type=int, default=8, help="pairs per forward of the padded baseline"
    )
    parser.add_argument("--max_tokens_per_batch", type=int, default=8192)
    parser.add_argument("--settings", default=",".join(LINES), help="lines, comma-separated")
    parser.add_argument("--least", type=int, default=3, help="steps of each line")
    add_common_arguments(parser, "runs/step", seconds=20.0)


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    for lengths in args.lengths.split(","):
        facts = {"lengths": lengths, "distribution": LENGTHS[lengths]._asdict()}
        yield facts | measure(lengths, args, device)


def measure(lengths: str, args: argparse.Namespace, device: torch.device) -> Case:
    """All lines on one distribution of lengths."""
    shape = SHAPES[SIZES[args.size]]
    trees = make_trees(lengths, args.pairs, shape.vocabulary)
    ablation = Ablation(
        shape,
        trees,
        device,
        padded_batch=args.padded_batch,
        max_tokens_per_batch=args.max_tokens_per_batch,
    )
    lines = _Lines(ablation)
    contenders = {
        name: Contender(
            call=lambda name=name: lines.steps[name](),
            check=lambda name=name: lines.check(name),
            absent=_absent(name, device),
        )
        for name in args.settings.split(",")
    }
    found = compare(contenders, device, seconds=args.seconds, warm_seconds=0.0, least=args.least)
    tokens = counted_tokens(trees)
    rows = {
        name: {
            **times.as_dict(),
            "pairs_per_second": len(trees) / times.median,
            "tokens_per_second": tokens / times.median,
            "peak_bytes": lines.peaks[name],
            **_mfu(ablation, times),
        }
        for name, times in found.times.items()
    }
    return {
        "pairs": len(trees),
        "size": args.size,
        "padded_batch": args.padded_batch,
        "max_tokens_per_batch": args.max_tokens_per_batch,
        "tokens": tokens,
        "device": str(device),
        "settings": rows,
        **found.reasons(),
    }


def _absent(name: str, device: torch.device) -> str | None:
    return "needs a GPU" if name == "liger norms" and device.type != "cuda" else None


class _Lines:
    """The lines that are ready; each held to the first one's loss and gradient norm."""

    def __init__(self, ablation: Ablation):
        self.ablation = ablation
        self.steps: dict[str, Step] = {}
        self.peaks: dict[str, int | None] = {}
        self._expected: tuple[float, float] | None = None

    def check(self, name: str) -> str:
        device = self.ablation.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self.steps[name] = self.ablation.lines()[name]()
        found = self.ablation.check(self.steps[name])
        self.peaks[name] = process_peak_bytes(device) if on_gpu else None
        self._expected = self._expected or found
        allowed = 3e-2 if self.ablation.bf16 else 1e-3
        off = max(abs(a - b) / abs(b) for a, b in zip(found, self._expected, strict=True))
        if off <= allowed:
            return ""
        return f"loss or gradient norm is off by {off:.1e}, allowed {allowed:.0e}"


def _mfu(ablation: Ablation, times: Times) -> dict[str, Any]:
    """Useful operations of the packed step over the peak: the same numerator for every line, so
    that it compares."""
    peak = peak_flops(ablation.device)
    if peak is None:
        return {}
    count = FlopCount.of(ablation.policy.model)
    packs = packed_shared(ablation.trees, ablation.budget)
    return {"mfu": sum(count.of_pack(batch) for batch in packs) / times.median / peak}


COLUMNS = (
    "setting",
    "s a step (p20 to p80)",
    "pairs/s",
    "over the line above",
    "tokens/s",
    "peak MiB",
    "MFU",
)


def table(case: Case) -> str:
    rows = []
    above = None
    for name, row in case["settings"].items():
        rate = row["pairs_per_second"]
        rows.append(
            [
                name if above is None else f"+ {name}",
                spread(row, 1.0, 3),
                f"{rate:.2f}",
                "" if above is None else f"{rate / above:.2f}x",
                f"{row['tokens_per_second']:,.0f}",
                mib(row["peak_bytes"]),
                f"{row['mfu']:.1%}" if "mfu" in row else "",
            ]
        )
        above = rate
    title = (
        f"{case['lengths']} lengths, model {case['size']}, {case['pairs']} pairs "
        f"({case['tokens']:,} tokens)"
    )
    return titled(title, COLUMNS, rows + reasons(case, len(COLUMNS)))


BENCHMARK = Benchmark(
    name="step",
    title="One optimizer step",
    cases=cases,
    table=table,
    bars=Bars("settings", "pairs_per_second", "pairs/s"),
)
