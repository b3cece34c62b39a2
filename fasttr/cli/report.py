"""`fasttr report RUN...`: one HTML file about a run, or about several and how they differ."""

from __future__ import annotations

import os
from pathlib import Path

from fasttr.cli.arguments import folders_and_flags, settings_parser
from fasttr.errors import FasttrError

DESCRIPTION = (
    "Write one HTML file that needs no network: settings, data, curves, samples, speed, versions; "
    "of several runs what differs between them, with paired intervals. The first run is what the "
    "others are compared with."
)


def run(args: list[str]) -> None:
    parser = settings_parser("fasttr report", DESCRIPTION, (), "RUN... [--output_file FILE]")
    parser.add_argument(
        "--output_file",
        type=str,
        help="the page; by default report.html in the run, or beside several",
    )
    if not args or args[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    folders, flags = folders_and_flags(args, ("output_file",))
    if not folders:
        raise FasttrError("got no run; wanted one or more: fasttr report RUN...")
    from fasttr.report.page import FILE, write_report

    beside = Path(folders[0])
    if len(folders) > 1:
        beside = Path(os.path.commonpath([Path(one).resolve().parent for one in folders]))
    target = flags.get("output_file", beside / FILE)
    try:
        print(write_report(folders, target))
    except OSError as error:
        raise FasttrError(f"output_file: cannot write {target}: {error}") from error
