"""What all benchmarks share: cases, each of which compares contenders; the JSON of a run; a table.

A case is measured as a whole, kept at once and printed, so that a run that is cut keeps what it had
finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from bench.timing import Call, Times, header, interleaved
from fasttr.environment import device_for
from fasttr.errors import first_line
from fasttr.files import write_json

Case = dict[str, Any]


class Bars(NamedTuple):
    """What a plot of a case shows: one bar for each of its rows."""

    rows: str  # key of the rows in a case
    value: str  # key of a figure in a row
    label: str


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of `python -m bench NAME`.

    Args:
        name: of its JSON file and of its table in the README.
        title: of its chapter in a report.
        cases: measures one case after the other on a device.
        table: a case as Markdown.
        bars: what is drawn of a case.
    """

    name: str
    title: str
    cases: Callable[[argparse.Namespace, torch.device], Iterator[Case]]
    table: Callable[[Case], str]
    bars: Bars | None = None

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Measure, keep and print case after case; returns what NAME.json holds."""
        result: dict[str, Any] = {"cases": [], "environment": header(command_line())}
        for case in self.cases(args, device_for(args.cpu)):
            result["cases"].append(case)
            write_json(args.out / f"{self.name}.json", result)
            print(self.table(case) + "\n", flush=True)
        return result


def add_common_arguments(parser: argparse.ArgumentParser, out: str, seconds: float) -> None:
    parser.add_argument("--seconds", type=float, default=seconds, help="of timing for each case")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")


def parsed(module: ModuleType, *given: str) -> argparse.Namespace:
    """The arguments of a benchmark's module, as its command line reads them."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(given)


def parse_seconds(text: str) -> float:
    """A budget of time: 9m, 240s, 1h or 30."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        return float(text) if unit is None else float(text[:-1]) * unit
    except ValueError:
        message = f"got {text!r}; wanted a time such as 9m, 240s or 1h"
        raise argparse.ArgumentTypeError(message) from None


def command_line() -> str:
    return "python -m bench " + " ".join(sys.argv[1:])


@dataclass(frozen=True)
class Contender:
    """One provider's attempt at a case.

    Args:
        call: what is timed.
        check: runs once before; empty, or why what the call gives is wrong.
        absent: why it cannot run here; then nothing of it runs.
    """

    call: Call
    check: Callable[[], str] = lambda: ""
    absent: str | None = None


class Comparison(NamedTuple):
    """What came out of a case: times of whoever was right, and why the others have none."""

    times: dict[str, Times]
    absent: dict[str, str]
    wrong: dict[str, str]

    def reasons(self) -> dict[str, dict[str, str]]:
        """As a case keeps them."""
        return {"absent": self.absent, "wrong": self.wrong}


def compare(
    contenders: Mapping[str, Contender],
    device: torch.device,
    *,
    seconds: float,
    yardsticks: Mapping[str, Call] | None = None,
    warm_seconds: float | None = None,
    least: int = 5,
) -> Comparison:
    """Check everybody, then time in turns those who were right, and the yardsticks beside them."""
    absent: dict[str, str] = {}
    wrong: dict[str, str] = {}
    calls: dict[str, Call] = {}
    for name, contender in contenders.items():
        if contender.absent:
            absent[name] = contender.absent
            continue
        try:
            reason = contender.check()
        except Exception as error:  # a peer's own failure is what is reported of it
            absent[name] = f"failed: {type(error).__name__}: {first_line(error)}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if reason:
            wrong[name] = reason
        else:
            calls[name] = contender.call
    calls |= yardsticks or {}
    times = interleaved(calls, device, seconds=seconds, warm_seconds=warm_seconds, least=least)
    return Comparison(times, absent, wrong)
