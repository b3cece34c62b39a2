"""`fasttr sweep`: one run for every combination of settings, a table of them, and one report."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.cli import arguments
from fasttr.errors import FasttrError

METHODS = ("train", "dpo", "kto", "sft")
DESCRIPTION = (
    "One run for every combination of settings whose values are separated by commas, such as "
    "--beta 0.05,0.1 --ref_update none,soft; a list as one value takes brackets ([sigmoid,sft]). "
    "METHOD is train, dpo, kto or sft; all its settings stand as there, and --output_dir is the "
    "folder of the whole sweep. The same command goes on with a sweep that was stopped, leaves out "
    "what is done, and ends in sweep.md and report.html."
)
TABLE = "sweep.md"
# Read only by a reference that moves: without one, combinations that differ in them are one run.
OF_A_MOVING_REFERENCE = ("ref_update_alpha", "ref_update_every")


class Combination(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    values: Mapping[str, str]  # the settings that are varied


class Outcome(NamedTuple):
    combination: Combination
    folder: Path
    status: int  # exit status; 0 also for one that was done before


def run(args: list[str]) -> None:
    method = args[0] if args and args[0] in METHODS else "train"
    words = arguments.read_words(args[1:] if args[:1] == [method] else args)
    if words.wants_help or not args:
        usage = "[METHOD] --SETTING VALUE,VALUE ... --output_dir FOLDER"
        arguments.settings_parser("fasttr sweep", DESCRIPTION, (), usage).parse_args(["--help"])
    fixed, varied = split_flags(words.flags)
    if not varied:
        raise FasttrError(
            "got nothing to vary; wanted a setting with commas, such as --beta 0.05,0.1,0.3"
        )
    if "output_dir" not in fixed:
        raise FasttrError("output_dir: missing; wanted the folder of the sweep")
    output_dir = Path(fixed.pop("output_dir")[0])
    given = [*_config_words(args), *_as_words(fixed)]
    sweep(method, given, combinations(varied), output_dir)


def sweep(
    method: str,
    given: Sequence[str],
    planned: Sequence[Combination],
    output_dir: Path,
    start: Callable[[list[str]], int] | None = None,
) -> list[Outcome]:
    """Run what is not done yet; `start` runs a command line and returns its exit status."""
    lines = {one.name: _line_of(given, one, output_dir) for one in planned}
    for one in planned:  # a mistake in the last run is told before the first one
        _check(method, lines[one.name], output_dir / one.name)
    outcomes = []
    for number, one in enumerate(planned, 1):
        folder = output_dir / one.name
        print(f"== run {number} of {len(planned)}: {one.name}", flush=True)
        if _is_done(folder):
            print("done before")
            status = 0
        else:
            line = [method, *lines[one.name], *_going_on(folder)]
            status = (start or _in_a_process)(line)
        outcomes.append(Outcome(one, folder, status))
    _conclude(outcomes, output_dir)
    return outcomes


def split_flags(
    flags: Mapping[str, list[str]],
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Flags with one value, and those with the values that their commas separate."""
    fixed, varied = {}, {}
    for name, words in flags.items():
        values = split_at_commas(" ".join(words))
        if len(values) > 1:
            varied[name] = values
        else:
            fixed[name] = words
    return fixed, varied


def split_at_commas(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def combinations(varied: Mapping[str, list[str]]) -> list[Combination]:
    """All of them, each once."""
    found = {}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        if chosen.get("ref_update") == "none":
            chosen = {k: v for k, v in chosen.items() if k not in OF_A_MOVING_REFERENCE}
        name = "_".join(f"{key}-{_in_a_name(value)}" for key, value in chosen.items())
        found[name] = Combination(name, chosen)
    return list(found.values())


def _in_a_name(value: str) -> str:
    return "".join(one if one.isalnum() or one in ".-+" else "-" for one in value).strip("-")


def _config_words(args: list[str]) -> list[str]:
    """`--config FILE` and `--recipe NAME` as they were given."""
    words = []
    for place, word in enumerate(args):
        if word in ("--config", "--recipe") and place + 1 < len(args):
            words += [word, args[place + 1]]
        elif word.startswith(("--config=", "--recipe=")):
            words.append(word)
    return words


def _as_words(flags: Mapping[str, list[str]]) -> Iterator[str]:
    for name, words in flags.items():
        yield f"--{name}"
        yield from words


def _line_of(given: Sequence[str], one: Combination, output_dir: Path) -> list[str]:
    varied = _as_words({name: [value] for name, value in one.values.items()})
    return [*given, *varied, "--output_dir", str(output_dir / one.name)]


def _check(method: str, line: list[str], folder: Path) -> None:
    """That the run can be configured, and is the one that its folder holds, if any."""
    from fasttr.cli.train import parse_train
    from fasttr.config.rules import check_sources

    with contextlib.redirect_stdout(io.StringIO()):  # what it notes is noted again by the run
        config = parse_train(list(line), method)
    check_sources(config, has_model=False, has_data=False, has_eval_data=False)
    saved = folder / "train_config.json"
    if saved.is_file():
        asked = config.as_dict()
        values = json.loads(saved.read_text())
        # What is left open, or to `auto`, a run decides and writes down.
        given = {
            name: asked.get(name) if _is_open(asked.get(name)) else value
            for name, value in values.items()
        }
        changed = config.differences(given)
        if changed:
            raise FasttrError(
                f"output_dir: {folder} was made with other settings ({'; '.join(changed)}); wanted "
                "the same, or another output_dir"
            )


def _is_open(value: Any) -> bool:
    return value is None or value == "auto"


def _is_done(folder: Path) -> bool:
    from fasttr.checkpoint.folder import holds_final
    from fasttr.metrics.log import last_line

    return "train_runtime" in last_line(folder) and holds_final(folder)


def _going_on(folder: Path) -> list[str]:
    """Flags for a run that was begun before."""
    from fasttr.checkpoint.folder import list_checkpoints

    if list_checkpoints(folder):
        return ["--resume_from_checkpoint", "true"]
    return ["--overwrite_output_dir", "true"] if folder.is_dir() else []


def _in_a_process(line: list[str]) -> int:
    """Each run in a process of its own: its memory is given back, and its end is not ours."""
    from fasttr.training.stopping import Interrupted, StopSignal

    with StopSignal() as stop:
        child = subprocess.Popen([sys.executable, "-m", "fasttr", *line])
        is_told = False
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5)
            # Ctrl-C reaches both processes of a terminal; SIGTERM this one alone.
            if stop.signum == signal.SIGTERM and not is_told:
                child.send_signal(signal.SIGTERM)
                is_told = True
    if stop.signum is not None:
        print("sweep stopped; the same command goes on with it")
        raise Interrupted(stop.signum)
    return child.returncode


def _conclude(outcomes: Sequence[Outcome], output_dir: Path) -> None:
    from fasttr.files import write_text
    from fasttr.report.page import FILE, write_report

    done = [one for one in outcomes if one.status == 0]
    table = _table(outcomes) + "\n\n± is half of a 95 % interval over rows."
    write_text(output_dir / TABLE, table + "\n")
    print("\n" + table)
    if done:
        print(write_report([one.folder for one in done], output_dir / FILE))
    if len(done) < len(outcomes):
        raise FasttrError(
            f"{len(outcomes) - len(done)} of {len(outcomes)} runs failed; their errors stand above"
        )


def _table(outcomes: Sequence[Outcome]) -> str:
    """A run a line: what was varied, and what it came to."""
    from fasttr.report.numbers import headline
    from fasttr.report.record import Record

    varied = list(dict.fromkeys(key for one in outcomes for key in one.combination.values))
    of_runs: list[dict[str, Any]] = []
    for one in outcomes:
        found: dict[str, Any] = {key: one.combination.values.get(key, "") for key in varied}
        if one.status == 0:
            numbers = headline(Record.of(one.combination.name, one.folder))
            found |= {label: number for number, label in numbers}
        else:
            found["optimizer steps"] = f"failed, status {one.status}"
        of_runs.append(found)
    columns = list(dict.fromkeys(key for found in of_runs for key in found))
    rows = [[str(found.get(column, "")) for column in columns] for found in of_runs]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
