"""`fasttr plot RUN...`: pictures of a run's metrics, or of several on the same axes."""

from __future__ import annotations

import os
from pathlib import Path

from fasttr.cli.arguments import folders_and_flags, settings_parser
from fasttr.errors import FasttrError

DESCRIPTION = (
    "Draw the metrics of a run as PNG files under RUN/plots, or those of several runs on the same "
    "axes, under comparison/ beside them."
)


def run(args: list[str]) -> None:
    parser = settings_parser("fasttr plot", DESCRIPTION, (), "RUN... [--output_dir FOLDER]")
    parser.add_argument("--output_dir", type=str, help="where pictures of several runs go")
    if not args or args[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    folders, flags = folders_and_flags(args, ("output_dir",))
    if not folders:
        raise FasttrError("got no run; wanted one or more: fasttr plot RUN...")
    from fasttr.metrics.plots import plot_comparison, plot_run, run_names

    if len(folders) == 1 and "output_dir" in flags:
        raise FasttrError("output_dir: pictures of one run go into RUN/plots; leave it out")
    if len(folders) == 1:
        written = plot_run(folders[0])
    else:
        runs = run_names(folders)
        beside = Path(os.path.commonpath([path.resolve().parent for path in runs.values()]))
        written = plot_comparison(runs, flags.get("output_dir", beside / "comparison"))
    for path in written:
        print(path)
