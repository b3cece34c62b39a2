"""`fasttr plot RUN`: pictures of a run's metrics."""

from __future__ import annotations

from fasttr.cli.arguments import settings_parser
from fasttr.errors import FasttrError


def run(args: list[str]) -> None:
    parser = settings_parser(
        "fasttr plot", "Draw the metrics of a run as PNG files under RUN/plots.", (), "RUN"
    )
    parser.add_argument("run", type=str, help="output_dir of a run, which holds metrics.jsonl")
    if not args or args[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    if len(args) > 1:
        raise FasttrError(f"got {' '.join(args)}; wanted one run: fasttr plot RUN")
    from fasttr.metrics.plots import plot_run

    for path in plot_run(args[0]):
        print(path)
