"""`python -m bench.paper.when`: in which settings does a moving reference help?"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.paper.when.design import SEEDS
from bench.paper.when.report import publish, write
from bench.paper.when.runs import Scale
from bench.paper.when.study import bind, make, read, tasks_of
from fasttr.errors import FasttrError

QUICK = Scale(steps=32, every=8, samples=96, pairs=200, held_pairs=48, sft_steps=120, sft_rows=2000)
QUICK_SEEDS = 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.paper.when", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/paper/when"))
    parser.add_argument(
        "--quick", action="store_true", help="two small seeds, too few for a verdict: 4 minutes"
    )
    parser.add_argument("--seeds", type=int, help=f"how many; default {SEEDS}, the whole design")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--most", type=int, help="stop after so many unfinished settings; call again to go on"
    )
    parser.add_argument(
        "--share",
        default="0/1",
        help="I/N: only every Nth seed from the Ith (from 0), where calls run side by side",
    )
    parser.add_argument("--report-only", action="store_true", help="no runs: what there is")
    parser.add_argument(
        "--publish", action="store_true", help="put the report beside the studies' page as well"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    asked = parse(argv)
    scale = QUICK if asked.quick else Scale()
    seeds = asked.seeds or (QUICK_SEEDS if asked.quick else SEEDS)
    try:
        bind(asked.out, scale)
    except FasttrError as error:
        raise SystemExit(str(error)) from None
    tasks = tasks_of(range(seeds), asked.out, scale)
    if not asked.report_only:
        first, every = map(int, asked.share.split("/"))
        own = [task for task in tasks if task.seed % every == first and task.missing]
        make(own[: asked.most], asked.workers)
    records = read(tasks)
    if asked.most is None:
        print(write(records, scale, asked.out))
    if asked.publish and records:
        publish(asked.out, Path(__file__).parents[1])
    left = sum(bool(task.missing) for task in tasks)
    print(f"{len(tasks) - left} of {len(tasks)} settings are complete in {asked.out}")


if __name__ == "__main__":
    main()
