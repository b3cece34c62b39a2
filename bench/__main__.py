"""`python -m bench WHAT`: the benchmarks, from a checkout, with argparse alone."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "head": "the loss head, forward and backward, beside its peers",
    "lerp": "the reference update beside its peers",
    "step": "one optimizer step and what each part of fasttr brings to it",
    "peers": "fasttr beside other trainers, on the same pairs",
    "overhead": "the trainer's own time per step, and tokenising and planning of many pairs",
    "all": "everything, within a budget of time",
    "tables": "write the tables of bench/README.md from bench/results",
}
MODULES = {"all": "everything"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    asked = (sys.argv[1:] if argv is None else argv)[:1]
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if asked == [name]:  # the others are not imported
            module = importlib.import_module(f"bench.{MODULES.get(name, name)}")
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
