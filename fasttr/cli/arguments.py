"""What every command shares: reading flags and files, and mistakes in one line."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from fasttr.config.trl import merge, nearest, our_keys, stands_alone, takes_list, translate
from fasttr.errors import FasttrError


def parse_train(args: list[str]):
    """The TrainConfig of a `fasttr train` command line: flags over file over preset over defaults.

    TRL's keys become ours; what is accepted without effect is printed, a line each.
    """
    file, flags, rest = read_args(args)
    for key, value in _environment(file).items():
        try:
            os.environ[str(key)] = str(value)  # before torch is imported, which reads some of them
        except ValueError as error:
            raise FasttrError(f"env: got {key!r}: {value!r}; {error}") from error
    from fasttr.config.train_config import PRESETS, TrainConfig

    values = merge(file, flag_values(flags))
    preset = values.pop("preset", None)
    parser = new_parser(
        "fasttr train", "Train a language model on preferences, with a reference that may move."
    )
    parser.add_argument(
        "--config", action="config", help="a flat YAML file whose keys are the flags, or TRL's keys"
    )
    parser.add_argument(
        "--preset", type=str, help=f"settings of the TR paper: {' or '.join(PRESETS)}"
    )
    parser.add_class_arguments(TrainConfig)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise FasttrError(f"preset: got {preset!r}; wanted one of {', '.join(PRESETS)}")
        parser.set_defaults(PRESETS[preset])
    ours, notices = translate(values)
    # Text goes the way of a flag, which jsonargparse reads as the type of its key.
    texts = {
        k: v
        for k, v in ours.items()
        if isinstance(v, str) or (isinstance(v, float) and not math.isfinite(v))
    }
    objects = {key: value for key, value in ours.items() if key not in texts}
    try:
        content = json.dumps(objects, default=str)
    except (ValueError, TypeError) as error:
        raise FasttrError(f"config: a value cannot be written as JSON: {error}") from error
    plain = [f"--config={content}", *(f"--{key}={value}" for key, value in texts.items()), *rest]
    parsed = vars(parse(parser, plain))
    known, _ = our_keys()
    if preset is not None and parsed["ref_update"] != PRESETS[preset]["ref_update"]:
        raise FasttrError(
            f"ref_update: got {parsed['ref_update']} with preset {preset}, which means "
            f"{PRESETS[preset]['ref_update']}; leave one of them out"
        )
    config = TrainConfig(**{key: value for key, value in parsed.items() if key in known})
    for notice in notices:
        print(notice)
    return config


def new_parser(prog: str, description: str) -> Any:
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise FasttrError(
            "the command line needs jsonargparse; run pip install 'fasttr[train]'"
        ) from error
    return ArgumentParser(prog=prog, description=description, exit_on_error=False)


def parse(parser: Any, args: list[str]) -> Any:
    """Parse; a mistake becomes one line that names the nearest valid key."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(args)
    except ArgumentError as error:
        raise FasttrError(_one_line(str(error), [a.dest for a in parser._actions])) from error


def _one_line(message: str, keys: list[str]) -> str:
    text = " ".join(message.split())
    if unknown := re.search(
        r"[Uu]nrecognized arguments: --([\w-]+)|Option '([\w.-]+)' is not accepted", text
    ):
        key = (unknown[1] or unknown[2]).replace("-", "_")
        return f"unknown key {key!r}{nearest(key, keys)}; --help lists all"
    if wrong := re.search(r'Parser key "(\w+)": (.*)', text):
        key, why = wrong[1], wrong[2]
        got = re.search(r"(?:Got|Given) value: (.*)$", why)
        kinds = re.findall(r"<class '(\w+)'>|typing\.(Literal\[[^\]]*\])", why)
        wanted = list(dict.fromkeys((a or b).replace("NoneType", "none") for a, b in kinds))
        if got and wanted:
            return f"{key}: got {got[1]}; wanted {' or '.join(wanted)}"
    return text


def read_args(args: list[str]) -> tuple[dict[str, Any], dict[str, list[str]], list[str]]:
    """The keys of all config files, the flags with their words, and what the parser itself answers
    (--help)."""
    file: dict[str, Any] = {}
    flags: dict[str, list[str]] = {}
    rest: list[str] = []
    pending = list(args)
    while pending:
        word, equals, value = pending.pop(0).partition("=")
        words = [value] if equals else []
        while not equals and pending and not pending[0].startswith("--") and pending[0] != "-h":
            words.append(pending.pop(0))
        key = word.removeprefix("--").replace("-", "_")
        if word == "-h" or key in ("help", "print_config") or "." in key:
            rest += [word + equals + value, *([] if equals else words)]
        elif not word.startswith("--"):
            raise FasttrError(f"got {word!r} where a flag was wanted, such as --beta 0.1")
        elif key == "config":
            file |= _read_yaml(" ".join(words))
        else:
            flags[key] = words
    return file, flags, rest


def _environment(file: dict[str, Any]) -> dict[str, Any]:
    """Take `env` out of a file's keys."""
    env = file.pop("env", None) or {}
    if not isinstance(env, dict):
        raise FasttrError(f"env: got {env!r}; wanted a mapping of names to values")
    return env


def flag_values(flags: dict[str, list[str]]) -> dict[str, Any]:
    """Flags as TRL's parser takes them: a bare one is true, `--no_x` is x false, several words are
    a list."""
    out: dict[str, Any] = {}
    for key, words in flags.items():
        negated = key.removeprefix("no_")
        if negated != key and key not in our_keys()[0] and not words:
            out[negated] = "false"
        elif len(words) > 1 and not takes_list(key):
            raise FasttrError(f"{key}: got {' '.join(words)}; wanted one value")
        elif not words and not stands_alone(key):
            raise FasttrError(f"{key}: got no value; wanted one after --{key}")
        else:
            out[key] = words if len(words) > 1 else words[0] if words else "true"
    return out


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
