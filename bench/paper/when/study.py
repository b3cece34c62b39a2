"""The runs of the study: which there are, which are done, and how they are shared out."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.paper.when.design import FIRST_SEED, Setting, settings_of
from bench.paper.when.runs import ARMS, Context, Scale, train_arm, train_sft
from fasttr.errors import FasttrError
from fasttr.files import write_json


class Record(NamedTuple):
    """One run; the seed counts from 0."""

    seed: int
    setting: Setting
    arm: str
    rows: list[dict[str, float]]  # of the initial policy, then along training

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.rows]


class Task(NamedTuple):
    """All arms of one setting, made by one process."""

    seed: int
    setting: Setting
    out: Path
    scale: Scale

    @property
    def sft(self) -> Path:
        return self.out / "sft" / f"seed{self.seed}"

    def path(self, arm: str) -> Path:
        folder = f"seed{self.seed:02d}-{self.setting.name}-{arm.replace(' ', '-')}"
        return self.out / "runs" / folder / "run.json"

    @property
    def missing(self) -> list[str]:
        return [arm for arm in ARMS if not self.path(arm).exists()]


def tasks_of(seeds: Iterable[int], out: Path, scale: Scale) -> list[Task]:
    return [Task(seed, setting, out, scale) for seed in seeds for setting in settings_of(seed)]


def bind(out: Path, scale: Scale) -> None:
    """A folder belongs to one scale. FasttrError where it holds runs of another."""
    path = out / "scale.json"
    if not path.exists():
        write_json(path, scale._asdict())
        return
    saved = json.loads(path.read_text())
    if saved != scale._asdict():
        raise FasttrError(
            f"--out: {out} holds runs of another scale ({saved}; wanted {scale._asdict()}); name "
            "another folder"
        )


def make(tasks: list[Task], workers: int) -> None:
    """Make what is missing, a process a worker, with the time that is left."""
    unfinished = [task for task in tasks if task.missing]
    firsts = {task.sft: task for task in reversed(unfinished) if not task.sft.exists()}
    total = sum(len(task.missing) for task in unfinished)
    with tqdm(total=len(firsts), desc="initial policies", unit="model") as bar:
        for _ in _shared_out(make_sft, list(reversed(firsts.values())), workers):
            bar.update()
    with tqdm(total=total, desc="runs", unit="run") as bar:
        for made in _shared_out(make_runs, unfinished, workers):
            bar.update(made)


def _shared_out(work: Any, tasks: list[Task], workers: int) -> Iterator[Any]:
    """Results as they come; in this process where one worker is asked for."""
    if workers == 1:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        waiting = [pool.submit(work, task) for task in tasks]
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()


def make_sft(task: Task) -> None:
    if task.sft.exists():
        return
    with _quiet(task.out / "log.txt"):
        train_sft(task.sft, FIRST_SEED + task.seed, task.scale)


def make_runs(task: Task) -> int:
    """Make the arms that are missing; how many they were. A run that is stopped leaves nothing that
    counts."""
    missing = task.missing
    with _quiet(task.out / "log.txt"):
        context = Context(task.setting, task.sft, FIRST_SEED + task.seed, task.scale)
        for arm in missing:
            path = task.path(arm)
            rows = train_arm(context, ARMS[arm], path.parent / "making")
            found = {"seed": task.seed, "setting": task.setting, "arm": arm, "rows": rows}
            write_json(path, found)
    return len(missing)


def read(tasks: list[Task]) -> list[Record]:
    """The runs of the seeds that are complete: a part of a seed's settings has not every level."""
    incomplete = {task.seed for task in tasks if task.missing}
    found = []
    for task in tasks:
        if task.seed in incomplete:
            continue
        for arm in ARMS:
            record = json.loads(task.path(arm).read_text())
            found.append(Record(task.seed, task.setting, arm, record["rows"]))
    return found


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """A run's own lines go into a file: only the study's progress is shown."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file):
        yield
