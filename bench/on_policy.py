"""Steps on given completions beside TRL's own trainers: a reward model's, a policy's with the
losses of GRPO and RLOO, a pass that scores, and RLOO's whole update. Generation is not in it.

    python -m bench on_policy --shapes 256:64 --completions 8

A shape is the tokens of a prompt and the most of a completion, whose lengths lie between half of it
and all. Both sides hold the same weights and are given the same ids; a case is timed only where
losses and gradient norms agree.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.harness import Benchmark, Case, Contender, add_common_arguments, compare
from bench.on_policy_sides import (
    SEED,
    Problem,
    Setting,
    Shape,
    Side,
    policy_sides,
    reward_sides,
    scoring_sides,
    update_sides,
)
from bench.text import reasons, spread, titled
from bench.timing import Times
from fasttr.models.scratch import init_model
from fasttr.toy.task import sft_rows, write_jsonl

AGREE = 1e-4  # relative, of loss and gradient norm: fp32 and another order of sums
KINDS: dict[str, Callable[[Setting], dict[str, Side]]] = {
    "reward": reward_sides,
    "grpo": lambda given: policy_sides(given, "grpo"),
    "rloo": lambda given: policy_sides(given, "rloo"),
    "scoring": scoring_sides,
    "update": update_sides,
}


class Outcome(NamedTuple):
    """What a step computed."""

    loss: float  # or what else it returns
    gradient_norm: float  # 0 where it makes none

    def agrees(self, other: Outcome) -> str:
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if abs(mine - theirs) > AGREE * max(abs(theirs), 1e-3):
                return f"{name} {mine:.6g}, TRL's {theirs:.6g}"
        return ""


def outcome(side: Side) -> Outcome:
    _clear(side)
    loss = float(side.step())
    parameters = [] if side.model is None else side.model.parameters()
    gradients = [p.grad for p in parameters if p.grad is not None]
    return Outcome(loss, float(nn.utils.get_total_norm(gradients)) if gradients else 0.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "runs/bench/on_policy", seconds=20)
    parser.add_argument("--shapes", default="512:53,256:64,64:64")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--completions", type=int, default=8, help="of a prompt, for the policy")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a pack")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder), args)
        for text in args.shapes.split(","):
            for kind in args.kinds.split(","):
                m = 2 if kind == "reward" else args.completions
                prompts = args.prompts * args.completions // m
                problem = Problem.drawn(Shape.parse(text), prompts, m, args.vocab)
                sides = KINDS[kind](Setting(model, problem, device, args.budget))
                yield _case(kind, text, problem, sides, args, device)


def _case(
    kind: str,
    shape: str,
    problem: Problem,
    sides: dict[str, Side],
    args: argparse.Namespace,
    device: torch.device,
) -> Case:
    found = {name: outcome(side) for name, side in sides.items()}
    contenders = {
        name: Contender(_cleared(side), check=lambda name=name: found[name].agrees(found["trl"]))
        for name, side in sides.items()
    }
    compared = compare(contenders, device, seconds=args.seconds)
    lengths = [len(prompt) + len(ids) for prompt, ids in problem.flat]
    packed = int(problem.trees.prompt_lengths.sum() + problem.trees.completion_lengths.sum())
    case = {
        "kind": kind,
        "shape": shape,
        "completions": len(lengths),
        "tokens_packed": packed,
        "tokens_padded": len(lengths) * max(lengths),
        "times": {name: times.as_dict() for name, times in compared.times.items()},
        **compared.reasons(),
    }
    if len(compared.times) == 2:
        case["faster"] = _ratio(compared.times).as_dict()
    return case


def _ratio(times: dict[str, Times]) -> Times:
    """TRL's seconds over ours, turn by turn."""
    turns = zip(times["trl"].turns, times["fasttr"].turns, strict=True)
    return Times.of([theirs / ours for theirs, ours in turns])


def _model(folder: Path, args: argparse.Namespace) -> Path:
    """A model of the size that is asked for, with a tokenizer that is never used."""
    write_jsonl(sft_rows(200, SEED), folder / "rows.jsonl")
    init_model(
        "llama",
        hidden_size=args.width,
        num_layers=args.layers,
        num_heads=4,
        vocab_size=args.vocab,
        tokenizer_data=str(folder / "rows.jsonl"),
        output_dir=str(folder / "model"),
        seed=SEED,
    )
    return folder / "model"


def _cleared(side: Side) -> Callable[[], Any]:
    """The step on gradients that are not there yet, as after an optimizer's."""

    def call() -> Any:
        _clear(side)
        return side.step()

    return call


def _clear(side: Side) -> None:
    if side.model is not None:
        side.model.zero_grad(set_to_none=True)


def table(case: Case) -> str:
    title = (
        f"{case['kind']}, {case['shape']}: {case['completions']} completions, "
        f"{case['tokens_packed']} tokens packed, {case['tokens_padded']} padded"
    )
    columns = ("", "ms", "TRL's time over it, turn by turn")
    rows = []
    for name, times in case["times"].items():
        is_ours = name == "fasttr" and "faster" in case
        ratio = f"{spread(case['faster'], 1.0, 1)}x" if is_ours else ""
        rows.append([name, spread(times, 1e-3, 0), ratio])
    return titled(title, columns, [*rows, *reasons(case, len(columns))])


BENCHMARK = Benchmark("on_policy", "Steps on given completions", cases, table)
