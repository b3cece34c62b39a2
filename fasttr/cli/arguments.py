"""What every command shares: reading flags and files, help, and mistakes in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fasttr.config.recipes import recipe_text
from fasttr.errors import FasttrError, did_you_mean, one_line
from fasttr.settings import Setting, check_values, settings_of

ANSWERED_AT_ONCE = ("help", "h", "print_config")


class Words(NamedTuple):
    """A command line, read but not understood."""

    file: dict[str, Any]  # the keys of --recipe and all --config files, later over earlier
    flags: dict[str, list[str]]  # each flag with the words after it
    wants_help: bool
    print_config: str | None  # "", or the option after --print_config=


def read_words(args: list[str]) -> Words:
    """Split a command line into files and flags. FasttrError on a word that follows no flag."""
    file: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    flags: dict[str, list[str]] = {}
    at_once: dict[str, str] = {}
    pending = list(args)
    while pending:
        word, equals, value = pending.pop(0).partition("=")
        values = [value] if equals else []
        while not equals and pending and not _is_flag(pending[0]):
            values.append(pending.pop(0))
        key = word.lstrip("-").replace("-", "_")
        one_dash = next((one for one in (word, *values) if re.match("-[A-Za-z]{2}", one)), None)
        if one_dash is not None:
            raise FasttrError(f"got {one_dash!r}; wanted a flag with two dashes: -{one_dash}")
        if not _is_flag(word):
            is_file = word.endswith((".yaml", ".yml"))
            wanted = f"--config {word}" if is_file else "a flag, such as --beta 0.1"
            raise FasttrError(f"got {word!r} where a flag was wanted; write {wanted}")
        if key in ANSWERED_AT_ONCE:
            at_once[key] = " ".join(values)
        elif key == "config":
            file |= read_yaml(" ".join(values))
        elif key == "recipe":
            recipe |= _recipe(" ".join(values))
        else:
            flags[key] = values
    return Words(
        {**recipe, **file}, flags, "help" in at_once or "h" in at_once, at_once.get("print_config")
    )


def read_yaml(path: str) -> dict[str, Any]:
    """The keys of a flat YAML file. FasttrError when it cannot be read or holds none."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        _check_keys(path, text)
        content = yaml.safe_load(text)
    except FasttrError:
        raise
    except (OSError, ValueError) as error:  # also text that is not UTF-8, or no path at all
        raise FasttrError(f"config: cannot read {path!r}: {error}") from error
    except yaml.YAMLError as error:
        raise FasttrError(f"config: {path} is not YAML: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FasttrError(f"config: {path} holds no keys; wanted lines such as beta: 0.1")
    return content


def _check_keys(path: str, text: str) -> None:
    """YAML itself takes the last of two values in silence."""
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    lines: dict[str, int] = {}
    for key, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        first = lines.setdefault(str(key.value), line)
        if first != line:
            raise FasttrError(
                f"config: {path} has {key.value} in line {first} and in line {line}; leave one of "
                "them out"
            )


def _recipe(name: str) -> dict[str, Any]:
    """The keys of a recipe of the package."""
    import yaml

    return yaml.safe_load(recipe_text(name))


def flag_values(
    flags: Mapping[str, list[str]],
    *,
    known: Iterable[str],
    takes_list: Callable[[str], bool],
    stands_alone: Callable[[str], bool],
) -> dict[str, Any]:
    """Flags as TRL's parser takes them.

    A bare one is true, `--no_x` is x false, several words are a list, `--x.y 1` is x with y: 1.
    """
    values: dict[str, Any] = {}
    for key, words in flags.items():
        name, _, inner = key.partition(".")
        negated = key.removeprefix("no_")
        if inner:
            values.setdefault(name, {})[inner] = _typed_word(" ".join(words))
        elif negated != key and key not in known and not words:
            values[negated] = "false"
        elif len(words) > 1 and not takes_list(key):
            raise FasttrError(f"{key}: got {' '.join(words)}; wanted one value")
        elif not words and not stands_alone(key):
            raise FasttrError(f"{key}: got no value; wanted one after --{key}")
        elif len(words) > 1:
            values[key] = words
        else:
            values[key] = words[0] if words else "true"
    return values


def settings_parser(
    prog: str, description: str, settings: Iterable[Setting], usage: str = "[--SETTING VALUE ...]"
) -> Any:
    """A parser of flags whose help has every setting's sentence and range, in groups."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise FasttrError(
            "the command line needs jsonargparse; run pip install 'fasttr[train]'"
        ) from error
    parser = ArgumentParser(
        prog=prog, usage=f"{prog} {usage}".strip(), description=description, exit_on_error=False
    )
    groups: dict[str, Any] = {}
    for one in settings:
        if one.group not in groups:
            groups[one.group] = parser.add_argument_group(one.group)
        default = {"required": True} if one.is_required else {"default": one.default}
        # argparse formats help by percent.
        text = one.sentence.replace("%", "%%")
        groups[one.group].add_argument(f"--{one.name}", type=one.type, help=text, **default)
    return parser


def typed(parser: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of files and flags in the types of their settings; defaults where there is none."""
    from jsonargparse import ArgumentError

    try:
        json.dumps(dict(values), default=str)  # YAML lets a value refer to itself
    except ValueError as error:
        raise FasttrError(f"config: a value cannot be written as JSON: {error}") from error
    try:
        return vars(parser.parse_object(dict(values)))
    except ArgumentError as error:
        names = [action.dest for action in parser._actions]
        raise FasttrError(_explained(error, names)) from error


def require_one_process() -> None:
    """Raise FasttrError under a launcher of several processes."""
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise FasttrError(
            "got several processes; this command runs in one: start it without torchrun"
        )


def settings_of_command(
    prog: str, description: str, config_class: type, args: list[str]
) -> dict[str, Any]:
    """The settings of a command that reads no files: its flags, typed. Answers --help."""
    settings = settings_of(config_class)
    parser = settings_parser(prog, description, settings.values())
    words = read_words(args)
    if words.wants_help:
        parser.parse_args(["--help"])
    values = flag_values(
        words.flags,
        known=settings,
        takes_list=lambda key: False,
        stands_alone=lambda key: key not in settings or settings[key].type is bool,
    )
    missing = [s.name for s in settings.values() if s.is_required and s.name not in values]
    if missing:
        raise FasttrError(f"{missing[0]}: missing; {settings[missing[0]].sentence}")
    found = typed(parser, values)
    check_values(settings.values(), found)
    return found


def folders_and_flags(args: list[str], known: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Words that stand by themselves, and flags with one value each, in any order."""
    known = list(known)
    words: list[str] = []
    flags: dict[str, str] = {}
    pending = list(args)
    while pending:
        word = pending.pop(0)
        if not _is_flag(word):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        key = flag.lstrip("-").replace("-", "_")
        if key not in known:
            raise FasttrError(f"unknown key {key!r}{did_you_mean(key, known)}; --help lists all")
        if not equals and (not pending or _is_flag(pending[0])):
            raise FasttrError(f"{key}: got no value; wanted one after --{key}")
        flags[key] = value if equals else pending.pop(0)
    return words, flags


def _is_flag(word: str) -> bool:
    return word.startswith("--") or word == "-h"


def _typed_word(word: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _explained(error: Exception, names: list[str]) -> str:
    """What the parser says, in one line that names the key, what was got and what is wanted."""
    text = one_line(error)
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w-]+)|'([\w.-]+)' is not accepted", text)
    if unknown:
        key = (unknown[1] or unknown[2]).replace("-", "_")
        return f"unknown key {key!r}{did_you_mean(key, names)}; --help lists all"
    wrong = re.search(r'Parser key "(\w+)": (.*)', text)
    if not wrong:
        return text
    key, why = wrong[1], wrong[2]
    got = re.search(r"(?:Got|Given) value: (.*)$", why)
    types = re.findall(r"<class '(\w+)'>", why.split("Given value type")[0])
    wanted = list(dict.fromkeys(kind.replace("NoneType", "none") for kind in types))
    if not got or not wanted:
        return text
    return f"{key}: got {got[1]}; wanted {' or '.join(wanted)}"
