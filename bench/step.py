"""One optimizer step, and what each part of fasttr brings to it: an ablation from padded batches to
the trainer.

    python -m bench step --lengths hh,ultrafeedback,tldr --size 10m

Each line keeps what the line above it has. Rows, weights, optimizer and dtype are the same; the
loss and the gradient's norm must equal those of the padded baseline before a line gets a number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import baselines
from bench.pairs import MODELS, model_folder
from bench.timing import header, interleaved, process_peak_bytes
from fasttr.batch import Tree
from fasttr.losses import Sigmoid, group_loss
from fasttr.optim.adamw import OptimizerConfig

BETA, LONGEST = 0.1, 1024


class Lengths(NamedTuple):
    """Log-normal lengths in tokens: median and spread (standard deviation of the logarithm)."""

    prompt: tuple[float, float]
    completion: tuple[float, float]


# Close to what 7B tokenizers count on these sets; fixed here, so that nothing is downloaded.
LENGTHS = {
    "hh": Lengths(
        (110.0, 0.85), (55.0, 0.85)
    ),  # dialogues: long shared prompts, short answers of unequal length
    "ultrafeedback": Lengths((110.0, 1.0), (300.0, 0.65)),
    "tldr": Lengths((340.0, 0.45), (35.0, 0.35)),
    "tiny": Lengths((8.0, 0.5), (6.0, 0.5)),
}
# What each line adds to the one above it.
SETTINGS = (
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
    parser.add_argument("--size", choices=MODELS, default="1b" if gpu else "10m")
    parser.add_argument("--pairs", type=int, default=64 if gpu else 16, help="pairs per step")
    parser.add_argument(
        "--padded_batch", type=int, default=8, help="pairs per forward of the padded baseline"
    )
    parser.add_argument("--max_tokens_per_batch", type=int, default=16384 if gpu else 8192)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma-separated")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of timing per length distribution"
    )
    parser.add_argument("--least", type=int, default=3, help="steps of each line")
    parser.add_argument("--out", type=Path, default=Path("runs/step"))
    parser.add_argument("--cpu", action="store_true")


def main(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "cases": [],
        "environment": header("python -m bench " + " ".join(sys.argv[1:])),
    }
    folder = model_folder(args.out, args.size, _words(args.out / "words.txt"))
    for lengths in args.lengths.split(","):
        one = case(lengths, str(folder), args, device)
        result["cases"].append(one)
        (args.out / "step.json").write_text(json.dumps(result, indent=1) + "\n")
        from bench.tables import step_table

        print(step_table(one) + "\n", flush=True)
    return result


def make_trees(lengths: str, rows: int, vocabulary: int, seed: int = 0) -> list[Tree]:
    """Random ids with the lengths of a data set, cut at LONGEST."""
    rng = np.random.default_rng(seed)
    spec = LENGTHS[lengths]

    def draw(median: float, spread: float, longest: int) -> int:
        return int(np.clip(rng.lognormal(np.log(median), spread), 2, longest))

    trees = []
    for row in range(rows):
        prompt = draw(*spec.prompt, LONGEST // 2)
        sides = [draw(*spec.completion, LONGEST - prompt) for _ in range(2)]
        ids = lambda n: rng.integers(4, vocabulary, n).astype(np.int32)  # noqa: E731
        trees.append(Tree(row, ids(prompt), tuple(ids(n) for n in sides)))
    return trees


class Trainer:
    """A policy with its optimizer, a live reference and a table of its scores: everything a line
    may use."""

    def __init__(
        self, folder: str, trees: list[Tree], args: argparse.Namespace, device: torch.device
    ):
        from transformers import AutoModelForCausalLM

        from fasttr.models.load import ModelConfig, load_model

        self.trees, self.args, self.device, self.bf16 = trees, args, device, device.type == "cuda"
        load = lambda **more: load_model(  # noqa: E731
            ModelConfig(folder, device=device, bf16=self.bf16, **more)
        )
        self.load, self.policy, self.reference = load, load(), load()
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        self.plain_reference = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        )
        with torch.no_grad():
            self.initial = [p.detach().clone() for p in self.policy.model.parameters()]
        self.scores = torch.cat(
            [
                self.reference.logps(batch).cpu()
                for batch, _ in self._by_row(baselines.packed_shared)
            ]
        ).view(-1, 2)
        self.loss = self.norm = 0.0

    def _by_row(self, packs: Callable[..., Any]) -> Any:
        """Packs of one tree each, in order: for the table."""
        for tree in self.trees:
            yield from packs([tree], 1)

    def finish(self, model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        parameters = list(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # Kept on the device: reading them is the caller's.
        self.loss, self.norm = loss, norm

    def restore(self, model: Any) -> None:
        with torch.no_grad():
            for p, start in zip(model.parameters(), self.initial, strict=True):
                p.copy_(start)

    def line(self, setting: str) -> tuple[Callable[[], None], Any]:
        """One optimizer step under a setting, and the model that it trains."""
        if setting == "padded":
            return self._padded(), self.plain
        if setting in ("packed", "prefix sharing", "completion-only head"):
            packs = baselines.packed_alone if setting == "packed" else baselines.packed_shared
            head = (
                baselines.completion_head
                if setting == "completion-only head"
                else baselines.full_head
            )
            return self._unfused(packs, head), self.policy.model
        model = self.policy
        if setting in ("liger norms", "compile"):
            model = self.load(use_liger_kernel=self.device.type == "cuda")
            if setting == "compile":
                model.model.base_model.compile(dynamic=True)
        return self._fused(model, live=setting == "fused loss"), model.model

    def _padded(self) -> Callable[[], None]:
        optimizer = _adamw(self.plain)

        def step() -> None:
            total = torch.zeros((), device=self.device)
            for first in range(0, len(self.trees), self.args.padded_batch):
                rows = self.trees[first : first + self.args.padded_batch]
                with torch.no_grad():
                    ref = baselines.padded(self.plain_reference, rows, self.bf16)
                loss = baselines.dpo_sum(
                    baselines.padded(self.plain, rows, self.bf16), ref, BETA
                ) / len(self.trees)
                loss.backward()
                total += loss.detach()
            self.finish(self.plain, optimizer, total)

        return step

    def _unfused(self, packs: Callable[..., Any], head: Callable[..., Any]) -> Callable[[], None]:
        optimizer = _adamw(self.policy.model)

        def step() -> None:
            total = torch.zeros((), device=self.device)
            for batch, _ in packs(self.trees, self.args.max_tokens_per_batch):
                with torch.no_grad():
                    ref = head(self.reference, batch)
                loss = baselines.dpo_sum(head(self.policy, batch), ref, BETA) / len(self.trees)
                loss.backward()
                total += loss.detach()
            self.finish(self.policy.model, optimizer, total)

        return step

    def _fused(self, model: Any, live: bool) -> Callable[[], None]:
        optimizer = _adamw(model.model)

        def step() -> None:
            total = torch.zeros((), device=self.device)
            for host, rows in baselines.packed_shared(self.trees, self.args.max_tokens_per_batch):
                batch = host.to(self.device)
                ref = (
                    self.reference.logps(batch)
                    if live
                    else self.scores[list(rows)].flatten().to(self.device)
                )
                fn = group_loss(Sigmoid(BETA), batch.token_counts, batch.weights)
                out = model(batch, fn, ref, normalizer=len(self.trees))
                out.loss.backward()
                total += out.loss.detach()
            self.finish(model.model, optimizer, total)

        return step


def _adamw(model: Any) -> Any:
    return OptimizerConfig(learning_rate=1e-6).optimizer(model)


def case(
    lengths: str, folder: str, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """All settings on one distribution of lengths."""
    trees = make_trees(lengths, args.pairs, MODELS[args.size]["vocab_size"])
    trainer = Trainer(folder, trees, args, device)
    tolerance = 3e-2 if trainer.bf16 else 1e-3
    steps, absent, wrong, found, peaks = {}, {}, {}, {}, {}
    for setting in args.settings.split(","):
        if setting == "liger norms" and device.type != "cuda":
            absent[setting] = "needs a GPU"
            continue
        try:
            step, model = trainer.line(setting)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step()
            found[setting] = (float(trainer.loss), float(trainer.norm))
            peaks[setting] = process_peak_bytes(device) if device.type == "cuda" else None
            trainer.restore(model)
        except (
            Exception
        ) as error:  # a setting that this machine cannot run is named, and the others go on
            absent[setting] = (
                f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            )
            continue
        base = found[next(iter(found))]
        off = max(abs(a - b) / abs(b) for a, b in zip(found[setting], base, strict=True))
        if not off <= tolerance:
            wrong[setting] = f"loss or gradient norm is off by {off:.1e}, allowed {tolerance:.0e}"
        else:
            steps[setting] = step
    times = interleaved(steps, device, seconds=args.seconds, warm_seconds=0.0, least=args.least)
    tokens = sum(2 * len(t.prompt_ids) + sum(map(len, t.completions)) for t in trees)
    rows = {
        name: {
            **t.as_dict(),
            "pairs_per_second": len(trees) / t.median,
            "tokens_per_second": tokens / t.median,
            "peak_bytes": peaks[name],
            **_mfu(trainer, t.median),
        }
        for name, t in times.items()
    }
    return {
        "lengths": lengths,
        "distribution": LENGTHS[lengths]._asdict(),
        "pairs": len(trees),
        "size": args.size,
        "padded_batch": args.padded_batch,
        "max_tokens_per_batch": args.max_tokens_per_batch,
        "tokens": tokens,
        "device": str(device),
        "settings": rows,
        "absent": absent,
        "wrong": wrong,
    }


def _mfu(trainer: Trainer, seconds: float) -> dict[str, float]:
    """Useful operations of the packed step over the peak: the same numerator for every line, so
    that it compares."""
    from fasttr.metrics.throughput import FlopCount, peak_flops

    peak = peak_flops(trainer.device)
    if peak is None:
        return {}
    count = FlopCount.of(trainer.policy.model)
    packs = baselines.packed_shared(trainer.trees, trainer.args.max_tokens_per_batch)
    return {"mfu": sum(count.of_pack(batch) for batch, _ in packs) / seconds / peak}


def _words(path: Path) -> Path:
    if not path.is_file():
        path.write_text("".join(f"word {i} of the tokenizer\n" for i in range(400)))
    return path
