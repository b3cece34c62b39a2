"""Which word runs which command, and how a mistake ends."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import textwrap
from typing import NamedTuple

from fasttr import before_torch
from fasttr.cli.launch import OF_A_MISTAKE, is_of_one_process, speaks
from fasttr.errors import FasttrError, did_you_mean
from fasttr.version import __version__


class Command(NamedTuple):
    """A module with a function `run(args)`, and what it is for."""

    module: str
    summary: str
    function: str = "run"


COMMANDS = {
    "train": Command(
        "fasttr.cli.train",
        "train on preferences: fasttr train --config run.yaml, or flags; --print_config shows all "
        "settings",
    ),
    "dpo": Command("fasttr.cli.train", "as trl dpo: train on pairs", "run_dpo"),
    "kto": Command(
        "fasttr.cli.train", "as trl kto: train on unpaired rows, or on pairs taken apart", "run_kto"
    ),
    "sft": Command(
        "fasttr.cli.train",
        "as trl sft: train on completions of prompts, conversations, or the chosen side of pairs",
        "run_sft",
    ),
    "reward": Command("fasttr.cli.reward", "train a reward model on pairs or ranked completions"),
    "grpo": Command(
        "fasttr.cli.online",
        "on-policy training with group-relative advantages: as trl grpo",
        "run_grpo",
    ),
    "rloo": Command(
        "fasttr.cli.online",
        "on-policy training with leave-one-out advantages: as trl rloo",
        "run_rloo",
    ),
    "ppo": Command(
        "fasttr.cli.online",
        "on-policy training with a critic beside the policy: proximal policy optimisation",
        "run_ppo",
    ),
    "ocrm": Command(
        "fasttr.cli.ocrm",
        "off-policy-corrected reward models, in stages; with --demo on generated data",
    ),
    "eval": Command(
        "fasttr.cli.evaluate",
        "log-probs and rewards of a split, by itself or against a fixed anchor; or samples for a "
        "file of prompts",
    ),
    "init": Command(
        "fasttr.cli.init",
        "write a small untrained model with a tokenizer, so that anything runs without a download",
    ),
    "plan": Command(
        "fasttr.cli.plan",
        "memory, step time and traffic on cards before anybody rents them, by a model: fasttr plan "
        "--model llama-3-70b --gpus 64",
    ),
    "plot": Command(
        "fasttr.cli.plot", "draw the metrics of a run, or of several: fasttr plot RUN..."
    ),
    "recipes": Command(
        "fasttr.cli.recipes",
        "recipes of the package, listed or copied; fasttr dpo --recipe NAME runs one",
    ),
    "sweep": Command(
        "fasttr.cli.sweep",
        "a run for every combination of settings: fasttr sweep --beta 0.05,0.1 --ref_update "
        "none,soft",
    ),
    "report": Command(
        "fasttr.cli.report",
        "one HTML file about a run, or about several and how they differ: fasttr report RUN...",
    ),
    "env": Command("fasttr.cli.env", "versions, devices and usable back ends"),
    "demo": Command(
        "fasttr.cli.demo",
        "the main job on generated data: SFT, then DPO beside TR-DPO, with a table and pictures",
    ),
}


# What a command may miss in an installation of fasttr alone.
NEEDED = {
    "torch",
    "numpy",
    "transformers",
    "datasets",
    "safetensors",
    "jsonargparse",
    "yaml",
    "tqdm",
    "tensorboard",
    "matplotlib",
}


def main(argv: list[str] | None = None) -> None:
    """Run one command; mistakes end in one line on standard error and exit status 2."""
    try:
        _answer(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # whoever read our output has left, such as `head`
        # Nor may Python complain when it empties its own buffer at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:  # a run that trains takes the signal itself, and saves
        print("fasttr: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _answer(args: list[str]) -> None:
    before_torch.prepare()
    if not args or args[0] in ("-h", "--help", "help"):
        _print_usage()
        return
    if args[0] in ("--version", "version"):
        print(f"fasttr {__version__}")
        return
    try:
        command = COMMANDS.get(args[0])
        if command is None:
            near = did_you_mean(args[0], COMMANDS)
            raise FasttrError(f"got command {args[0]!r}; wanted one of {', '.join(COMMANDS)}{near}")
        _run(command, args)
    except FasttrError as error:
        if speaks() or is_of_one_process(error):
            print(f"fasttr: error: {error}", file=sys.stderr)
        sys.exit(OF_A_MISTAKE)


def _run(command: Command, args: list[str]) -> None:
    try:
        module = importlib.import_module(command.module)
        getattr(module, command.function)(args[1:])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        raise FasttrError(
            f"fasttr {args[0]} needs the package {package}; run pip install 'fasttr[train]'"
        ) from error


def _print_usage() -> None:
    print("usage: fasttr COMMAND ...; fasttr COMMAND --help shows its settings\n")
    width = max(map(len, COMMANDS)) + 2
    columns = shutil.get_terminal_size().columns - 2
    for name, command in COMMANDS.items():
        start, rest = f"  {name:{width}}", " " * (width + 2)
        line = textwrap.fill(
            command.summary,
            columns,
            initial_indent=start,
            subsequent_indent=rest,
            break_on_hyphens=False,
        )
        print(line)
