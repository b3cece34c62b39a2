"""`python -m bench WHAT`: the benchmarks, from a checkout, with argparse alone."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from fasttr import before_torch


class Command(NamedTuple):
    """A module with `add_arguments(parser)`, and with `main(args)` or a BENCHMARK that runs."""

    module: str
    summary: str

    def runner(self) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[Any], Any]]:
        module = importlib.import_module(self.module)
        benchmark = getattr(module, "BENCHMARK", None)
        return module.add_arguments, module.main if benchmark is None else benchmark.run


COMMANDS = {
    "peers": Command("bench.peers", "fasttr beside other trainers, on the same pairs"),
    "head": Command("bench.head", "the loss head, forward and backward, beside its peers"),
    "lerp": Command("bench.lerp", "the reference update beside its peers"),
    "optim": Command("bench.optim", "the optimizer's step beside its peers"),
    "layer": Command("bench.layer", "one decoder layer: fp32, split, all bf16, compiled"),
    "attention": Command("bench.attention", "attention over packed trees, back end by back end"),
    "on_policy": Command("bench.on_policy", "steps on given completions beside TRL's trainers"),
    "step": Command("bench.step", "one optimizer step and what each part of fasttr brings to it"),
    "overhead": Command(
        "bench.overhead", "the trainer's own time per step; tokenising and planning of many pairs"
    ),
    "scale": Command("bench.scale", "steps, planning and tables of many processes, simulated"),
    "all": Command("bench.everything", "everything, within a budget of time"),
    "gpu": Command("bench.gpu.runner", "all that is worth knowing of a GPU, part by part"),
    "tables": Command("bench.tables", "write the tables of bench/README.md from bench/results"),
}


def main(argv: list[str] | None = None) -> None:
    before_torch.prepare()
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    given = (sys.argv[1:] if argv is None else argv)[:1]
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.summary, description=command.summary)
        if given == [name]:  # the others are not imported
            add_arguments, run = command.runner()
            add_arguments(subparser)
            subparser.set_defaults(run=run)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
