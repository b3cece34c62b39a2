"""`fasttr recipes`: the recipes of the package, listed, or copied to be changed."""

from __future__ import annotations

import textwrap
from pathlib import Path

from fasttr.cli.arguments import settings_parser
from fasttr.config.recipes import (
    SUFFIX,
    recipe_command,
    recipe_names,
    recipe_summary,
    recipe_text,
)
from fasttr.errors import FasttrError

IN = " " * 6
DESCRIPTION = (
    "List the recipes of the package under the commands that run them (flags win over a recipe); "
    "fasttr recipes copy NAME writes its file here, or to FILE, to be changed."
)


def run(args: list[str]) -> None:
    if args and args[0] in ("-h", "--help"):
        settings_parser("fasttr recipes", DESCRIPTION, (), "[copy NAME [FILE]]").parse_args(
            ["--help"]
        )
    if not args:
        _list()
    elif args[0] == "copy" and len(args) in (2, 3):
        _copy(args[1], Path(args[2]) if len(args) == 3 else None)
    else:
        raise FasttrError(f"got {' '.join(args)}; wanted nothing, or: copy NAME [FILE]")


def _list() -> None:
    of_commands: dict[str, list[str]] = {}
    for name in recipe_names():
        of_commands.setdefault(recipe_command(name), []).append(name)
    for command, names in of_commands.items():
        print(f"fasttr {command} --recipe NAME")
        for name in names:
            print(f"  {name}")
            print(textwrap.fill(recipe_summary(name), 80, initial_indent=IN, subsequent_indent=IN))
        print()
    print("fasttr recipes copy NAME writes one here, with its comments")


def _copy(name: str, target: Path | None) -> None:
    text = recipe_text(name)
    target = target or Path(name.removesuffix(SUFFIX) + SUFFIX)
    if target.exists():
        raise FasttrError(f"{target} is there already; wanted another file")
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FasttrError(f"cannot write {target}: {error}") from error
    print(f"wrote {target}; run it with fasttr {recipe_command(name)} --config {target}")
