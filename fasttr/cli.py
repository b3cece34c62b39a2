"""The command `fasttr`: train, init, plot, env, demo."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import sys
from typing import Any

from fasttr.errors import FasttrError

COMMANDS = {
    "train": "train on preferences: fasttr train --config run.yaml, or flags; --print_config shows all settings",
    "init": "write a small untrained model with a tokenizer, so that anything runs without a download",
    "plot": "draw the metrics of a run: fasttr plot RUN",
    "env": "versions, devices and usable back ends",
    "demo": "the main job on generated data: SFT, then DPO beside TR-DPO, with a table and pictures",
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
                f"got command {args[0]!r}; wanted one of {', '.join(COMMANDS)}{_nearest(args[0], COMMANDS)}"
            )
        globals()[f"_{args[0]}"](args[1:])
    except FasttrError as error:
        print(f"fasttr: error: {error}", file=sys.stderr)
        sys.exit(2)


def _train(args: list[str]) -> None:
    config = parse_train(args)
    from fasttr.trainer import train

    train(config)


def parse_train(args: list[str]):
    """The TrainConfig of a `fasttr train` command line: flags over file over preset over defaults."""
    from fasttr.config import PRESETS, TrainConfig

    parser = _parser("fasttr train", "Train a language model on preferences, with a reference that may move.")
    parser.add_argument("--config", action="config", help="a flat YAML file whose keys are the flags")
    parser.add_argument("--preset", type=str, help=f"settings of the TR paper: {' or '.join(PRESETS)}")
    parser.add_class_arguments(TrainConfig)
    optional = {field.name for field in dataclasses.fields(TrainConfig) if "None" in str(field.type)}
    plain, preset = _plain_args(args, optional)
    if preset is not None:
        if preset not in PRESETS:
            raise FasttrError(f"preset: got {preset!r}; wanted one of {', '.join(PRESETS)}")
        parser.set_defaults(PRESETS[preset])
    parsed = _parse(parser, plain)
    values = {key: value for key, value in vars(parsed).items() if key not in ("config", "preset")}
    if preset is not None and values["ref_update"] != PRESETS[preset]["ref_update"]:
        raise FasttrError(
            f"ref_update: got {values['ref_update']} with preset {preset}, which means "
            f"{PRESETS[preset]['ref_update']}; leave one of them out"
        )
    return TrainConfig(**values)


def _init(args: list[str]) -> None:
    from fasttr.scratch import init_model

    parser = _parser("fasttr init", "Write a Hugging Face folder with random weights and a trained tokenizer.")
    parser.add_function_arguments(init_model)
    init_model(**vars(_parse(parser, args)))


def _plot(args: list[str]) -> None:
    from fasttr.plots import plot_run

    parser = _parser("fasttr plot", "Draw the metrics of a run as PNG files under RUN/plots.")
    parser.add_argument("run", type=str, help="output_dir of a run")
    for path in plot_run(_parse(parser, args).run):
        print(path)


def _env(args: list[str]) -> None:
    from fasttr.environment import report

    _parse(_parser("fasttr env", "Versions, devices and usable back ends."), args)
    print(report())


def _demo(args: list[str]) -> None:
    from fasttr.demo import demo

    parser = _parser("fasttr demo", "SFT, then DPO beside TR-DPO on generated data with a known gold reward.")
    parser.add_function_arguments(demo)
    demo(**vars(_parse(parser, args)))


def _parser(prog: str, description: str) -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise FasttrError("the command line needs jsonargparse; run pip install 'fasttr[train]'") from error
    return ArgumentParser(prog=prog, description=description, exit_on_error=False)


def _parse(parser: Any, args: list[str]) -> Any:
    """Parse; a mistake becomes one line that names the nearest valid key."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        raise FasttrError(_one_line(str(error), [a.dest for a in parser._actions])) from error


def _one_line(message: str, keys: list[str]) -> str:
    text = " ".join(message.split())
    if unknown := re.search(r"[Uu]nrecognized arguments: --([\w-]+)|Option '([\w.-]+)' is not accepted", text):
        key = (unknown[1] or unknown[2]).replace("-", "_")
        return f"unknown key {key!r}{_nearest(key, keys)}; --help lists all"
    if wrong := re.search(r'Parser key "(\w+)": (.*)', text):
        key, why = wrong[1], wrong[2]
        got = re.search(r"(?:Got|Given) value: (.*)$", why)
        kinds = re.findall(r"<class '(\w+)'>|typing\.(Literal\[[^\]]*\])", why)
        wanted = list(dict.fromkeys((a or b).replace("NoneType", "none") for a, b in kinds))
        if got and wanted:
            return f"{key}: got {got[1]}; wanted {' or '.join(wanted)}"
    return text


def _nearest(key: str, keys: Any) -> str:
    close = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _plain_args(args: list[str], optional: set[str]) -> tuple[list[str], str | None]:
    """The arguments with every config file read and `none` as null where a key may be, and the preset they name."""
    out: list[str] = []
    preset = None
    pending = list(args)
    while pending:
        key, equals, value = pending.pop(0).partition("=")
        if key in ("--config", "--preset") or key[2:] in optional:
            if not equals and pending and not pending[0].startswith("--"):
                value, equals = pending.pop(0), "="
            if key == "--config":
                content = _read_yaml(value)
                content = {k: _yaml_value(k, v, optional) for k, v in content.items()}
                preset = content.pop("preset", preset)
                value = json.dumps(content)
            elif key == "--preset":
                preset = value
                continue
            elif _is_none(value):
                value = "null"
        out.append(key + equals + value)
    return out, preset


def _yaml_value(key: str, value: Any, optional: set[str]) -> Any:
    """What YAML 1.1 reads otherwise than it is meant: `none` as a word, and an unquoted `no` as false."""
    if key in optional and _is_none(value):
        return None
    return "no" if key.endswith("_strategy") and value is False else value


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("none", "null")


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as error:
        raise FasttrError(f"config: cannot read {path!r}: {error}") from error
    except yaml.YAMLError as error:
        raise FasttrError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FasttrError(f"config: {path} holds no keys; wanted lines such as beta: 0.1")
    return content


if __name__ == "__main__":
    main()
