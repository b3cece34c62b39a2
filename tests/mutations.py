"""Whether the tests notice small faults: python -m tests.mutations [--only WORD] [--jobs 2]

Each mutant of mutants.toml is put into a copy of the tree, and the tests that it names are run
there: it is killed by the first of them that fails. The tests that killed are run at the end
without any mutant: a test that fails anyway has killed nobody. What was found is kept in a file and
not run again while the mutant, its file and the tests that it names stay as they are.

Exit status: 0 when all are killed, 1 when one survives, 3 when one could not be tried.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from tests.places import ROOT

MUTANTS = ROOT / "tests" / "mutants.toml"
FOUND = ROOT / "runs" / "mutations.jsonl"
FOLDERS = ("fasttr", "kernels", "tests", "bench", "docs", "examples")
FILES = ("pyproject.toml", "README.md", "REFERENCE.md")
LONGEST = 300  # seconds of a processor for a mutant's tests; what takes more hangs: it is noticed
# What pytest's exit status says of a mutant; another one says that its tests did not run.
KILLED, SURVIVED, NOT_TRIED = "killed", "survived", "not tried"
VERDICTS = {0: SURVIVED, 1: KILLED}
DIED = 70  # exit status of a trial that did not come as far as pytest
PAUSE = 0.05  # seconds between looks at what runs
OPTIONS = ["-rfE", "-p", "no:cacheprovider", "--tb=no", "--durations=0"]
SLOW = ("torch", "transformers.models.llama.modeling_llama", "transformers.modeling_utils")


class Mutant(NamedTuple):
    """One fault: a text of a file, what stands in its place, and the tests that should fail."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def mutated(self, text: str) -> str:
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.name}: {self.old!r} is {found} times in {self.file}; wanted 1")
        return text.replace(self.old, self.new)

    def key(self) -> str:
        """Changes with the mutant, its file, and the files of its tests."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=16)
        for name in [self.file, *(test.partition("::")[0] for test in self.tests)]:
            for path in _files_of(ROOT / name):
                digest.update(path.read_bytes())
        return digest.hexdigest()


class Finding(NamedTuple):
    key: str
    name: str
    verdict: str
    by: str  # the first test that failed, or the last words of a run that did not happen
    seconds: float


def read_mutants() -> list[Mutant]:
    with MUTANTS.open("rb") as file:
        return [Mutant(**one) for one in tomllib.load(file)["mutant"]]


def main(args: list[str] | None = None) -> int:
    options = _options(args)
    wanted = [one for one in read_mutants() if options.only in f"{one.file} {one.name}"]
    known = {} if options.fresh else _found_before()
    found = [known[one.key()] for one in wanted if one.key() in known]
    pending = [one for one in wanted if one.key() not in known]
    began = time.perf_counter()
    _warm_up()
    tried = []
    for finding in _tried(pending, options.jobs):
        tried.append(finding)
        _keep(finding)
        print(_line(finding), flush=True)
    found += _checked(tried)
    print(_summary(found, len(pending), time.perf_counter() - began))
    return _status(found)


def _options(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose file or name holds this word")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tried side by side")
    parser.add_argument("--fresh", action="store_true", help="try again what is known")
    return parser.parse_args(args)


def _tried(mutants: list[Mutant], jobs: int) -> Iterator[Finding]:
    """Each mutant in a copy of the tree, `jobs` of them at a time."""
    pending = list(reversed(mutants))
    running: list[tuple[Mutant, Trial]] = []
    # The tree may change while this runs: what is found is of the tree as it was.
    original = {one.file: (ROOT / one.file).read_text() for one in mutants}
    keys = {one.name: one.key() for one in mutants}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        free = [_copied_to(Path(folder) / str(job)) for job in range(jobs)]
        while pending or running:
            while pending and free:
                mutant = pending.pop()
                tree = free.pop()
                (tree / mutant.file).write_text(mutant.mutated(original[mutant.file]))
                running.append((mutant, Trial(tree, mutant.tests, LONGEST)))
            for mutant, trial in [one for one in running if one[1].is_over()]:
                running.remove((mutant, trial))
                (trial.tree / mutant.file).write_text(original[mutant.file])
                free.append(trial.tree)
                verdict, by = trial.verdict()
                yield Finding(keys[mutant.name], mutant.name, verdict, by, trial.seconds)
            time.sleep(PAUSE)


def _checked(tried: list[Finding]) -> list[Finding]:
    """The findings, but for those of tests that fail without a mutant too."""
    killers = sorted({one.by for one in tried if "::" in one.by})
    if not killers:
        return tried
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trial = Trial(_copied_to(Path(folder) / "tree"), killers, 10 * LONGEST, stops=False)
        while not trial.is_over():
            time.sleep(PAUSE)
        fail_anyway = set(trial.failed())
    checked = []
    for finding in tried:
        if finding.by in fail_anyway:
            reason = f"{finding.by} fails without it too"
            finding = finding._replace(verdict=NOT_TRIED, by=reason)
            _keep(finding)
        checked.append(finding)
    return checked


class Trial:
    """A run of tests in a copy of the tree, in a process of its own.

    The process is forked from this one, which has imported what takes long and is none of ours.
    """

    def __init__(self, tree: Path, tests: list[str], longest: int, *, stops: bool = True):
        self.tree = tree
        self._output = tree / "output.txt"
        self._longest = longest
        self._began = time.perf_counter()
        self._status: int | None = None  # of pytest; negative: the signal that ended it
        self.seconds = 0.0
        self._pid = os.fork()
        if self._pid == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (longest, longest))
            _be_pytest(tree, ["-x", *tests] if stops else tests, self._output)

    def is_over(self) -> bool:
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        waited = time.perf_counter() - self._began
        if pid == 0 and waited > 20 * self._longest:  # it sleeps, or the machine is very busy
            os.killpg(self._pid, signal.SIGKILL)
            pid, status = os.waitpid(self._pid, 0)
        if pid != 0:
            self._status = os.waitstatus_to_exitcode(status)
            self.seconds = round(time.perf_counter() - self._began, 1)
        return pid != 0

    def verdict(self) -> tuple[str, str]:
        """What became of the mutant, and by which test."""
        if self._status in (-signal.SIGXCPU, -signal.SIGKILL):
            return KILLED, f"no end after {self._longest} s of a processor"
        verdict = VERDICTS.get(self._status, NOT_TRIED)
        if verdict == SURVIVED:
            return verdict, ""
        last_words = " ".join(self._output.read_text(errors="replace")[-200:].split())
        return verdict, next(iter(self.failed()), last_words)

    def failed(self) -> list[str]:
        """The tests that failed, as pytest's summary names them."""
        lines = self._output.read_text(errors="replace").splitlines()
        summary = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        return [line.partition(" ")[2].partition(" - ")[0] for line in summary]


def _be_pytest(tree: Path, arguments: list[str], output: Path) -> NoReturn:
    """Run the tests as the process that this one has become, and end."""
    status = DIED
    try:
        os.setpgid(0, 0)
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tree)
        places = [str(tree), str(tree / "kernels")]
        os.environ["PYTHONPATH"] = ":".join(places)
        sys.path[:] = [*places, *(place for place in sys.path if not _is_ours(place))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        status = int(pytest.main([*OPTIONS, *arguments]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _is_ours(place: str) -> bool:
    return Path(place or ".").resolve() in (ROOT, ROOT / "kernels")


def _warm_up() -> None:
    """Import what the tests need and what takes long, as tests/conftest.py would have it."""
    os.environ |= {
        "OMP_WAIT_POLICY": "passive",
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name in SLOW:
        importlib.import_module(name)


def _copied_to(folder: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    return folder


def _files_of(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _found_before() -> dict[str, Finding]:
    if not FOUND.is_file():
        return {}
    findings = [Finding(**json.loads(line)) for line in FOUND.read_text().splitlines()]
    return {one.key: one for one in findings}


def _keep(finding: Finding) -> None:
    FOUND.parent.mkdir(exist_ok=True)
    with FOUND.open("a") as file:
        file.write(json.dumps(finding._asdict()) + "\n")


def _line(finding: Finding) -> str:
    return f"{finding.verdict:11}  {finding.seconds:6.1f} s  {finding.name}  {finding.by}"


def _summary(found: Iterable[Finding], tried: int, seconds: float) -> str:
    found = list(found)
    counts = Counter(one.verdict for one in found)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines = [f"{len(found)} mutants: {said} ({tried} of them now, in {seconds:.0f} s)"]
    lines += [_line(one) for one in found if one.verdict != KILLED]
    return "\n".join(lines)


def _status(found: Iterable[Finding]) -> int:
    verdicts = {one.verdict for one in found}
    if NOT_TRIED in verdicts:
        return 3
    return 1 if SURVIVED in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
