"""The command `fasttr`: train, eval, init, plot, env, demo."""

from __future__ import annotations

import os
import sys

from fasttr.cli.arguments import new_parser, parse, parse_train
from fasttr.config.trl import nearest
from fasttr.errors import FasttrError

COMMANDS = {
    "train": "train on preferences: fasttr train --config run.yaml, or flags; --print_config shows "
    "all settings",
    "eval": "score a split, by itself or against a fixed anchor; or sample for a file of prompts",
    "init": "write a small untrained model with a tokenizer, so that anything runs without a "
    "download",
    "plot": "draw the metrics of a run: fasttr plot RUN",
    "env": "versions, devices and usable back ends",
    "demo": "the main job on generated data: SFT, then DPO beside TR-DPO, with a table and "
    "pictures",
}


def main(argv: list[str] | None = None) -> None:
    """Run one command; mistakes end in one line on standard error and exit status 2."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print("usage: fasttr COMMAND ...\n")
        print("\n".join(f"  {name:7}{text}" for name, text in COMMANDS.items()))
        return
    try:
        if args[0] not in COMMANDS:
            raise FasttrError(
                f"got command {args[0]!r}; wanted one of "
                f"{', '.join(COMMANDS)}{nearest(args[0], COMMANDS)}"
            )
        globals()[f"_{args[0]}"](args[1:])
    except FasttrError as error:
        print(f"fasttr: error: {error}", file=sys.stderr)
        sys.exit(2)


def _train(args: list[str]) -> None:
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise FasttrError(
            "got several processes; one process trains until sharding is built: start without "
            "torchrun"
        )
    config = parse_train(args)
    from fasttr.training.loop import train

    train(config)


def _eval(args: list[str]) -> None:
    from fasttr.cli.evaluate import main as evaluate

    evaluate(args)


def _init(args: list[str]) -> None:
    from fasttr.models.scratch import init_model

    parser = new_parser(
        "fasttr init", "Write a Hugging Face folder with random weights and a trained tokenizer."
    )
    parser.add_function_arguments(init_model)
    init_model(**vars(parse(parser, args)))


def _plot(args: list[str]) -> None:
    from fasttr.metrics.plots import plot_run

    parser = new_parser("fasttr plot", "Draw the metrics of a run as PNG files under RUN/plots.")
    parser.add_argument("run", type=str, help="output_dir of a run")
    for path in plot_run(parse(parser, args).run):
        print(path)


def _env(args: list[str]) -> None:
    from fasttr.environment import report

    parse(new_parser("fasttr env", "Versions, devices and usable back ends."), args)
    print(report())


def _demo(args: list[str]) -> None:
    from fasttr.toy.demo import demo

    parser = new_parser(
        "fasttr demo", "SFT, then DPO beside TR-DPO on generated data with a known gold reward."
    )
    parser.add_function_arguments(demo)
    demo(**vars(parse(parser, args)))
