"""`fasttr env`: what this machine has."""

from __future__ import annotations

from fasttr.cli.arguments import settings_parser
from fasttr.errors import FasttrError


def run(args: list[str]) -> None:
    parser = settings_parser("fasttr env", "Versions, devices and usable back ends.", (), "")
    if args and args[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if args:
        raise FasttrError(f"got {' '.join(args)}; fasttr env takes nothing")
    from fasttr.environment import report

    print(report())
