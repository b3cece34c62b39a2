"""Whether the tests notice small faults: python -m tests.mutations [--only WORD] [--jobs 2]

Each mutant of mutants.toml is put into a copy of the tree, and the tests that it names are run
there: it is killed when one of them fails. What was found is kept in a file and not run again while
the mutant, its file and the tests that it names stay as they are.

Exit status: 0 when all are killed, 1 when one survives, 3 when one could not be run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tests.places import ROOT

MUTANTS = ROOT / "tests" / "mutants.toml"
FOUND = ROOT / "runs" / "mutations.jsonl"
FOLDERS = ("fasttr", "kernels", "tests", "bench", "docs", "examples")
FILES = ("pyproject.toml", "README.md", "REFERENCE.md")
LONGEST = 300  # seconds of a mutant's tests; what runs longer hangs, and is noticed
# What pytest's exit status says of a mutant; another one says that its tests did not run.
VERDICTS = {0: "survived", 1: "killed"}
DID_NOT_RUN = "did not run"


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
    if pending and not _pass_unchanged(pending):
        print("the tests fail without any mutant: nothing can be said of them")
        return 3
    for finding in _tried(pending, options.jobs):
        found.append(finding)
        _keep(finding)
        print(_line(finding), flush=True)
    print(_summary(found, len(pending), time.perf_counter() - began))
    return _status(found)


def _options(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose file or name holds this word")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tried side by side")
    parser.add_argument("--fresh", action="store_true", help="try again what is known")
    return parser.parse_args(args)


def _pass_unchanged(mutants: list[Mutant]) -> bool:
    """Whether the named tests pass without a mutant: what fails anyway would kill them all."""
    tests = sorted({test for one in mutants for test in one.tests})
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = _copied_to(Path(folder))
        return _pytest(tree, tests, LONGEST * 10).returncode == 0


def _tried(mutants: list[Mutant], jobs: int) -> Iterator[Finding]:
    with (
        tempfile.TemporaryDirectory(prefix="mutations-") as folder,
        ThreadPoolExecutor(jobs) as pool,
    ):
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(jobs):
            trees.put(_copied_to(Path(folder) / str(job)))
        futures = [pool.submit(_try, one, trees) for one in mutants]
        for future in as_completed(futures):
            yield future.result()


def _try(mutant: Mutant, trees: queue.SimpleQueue[Path]) -> Finding:
    tree = trees.get()
    path = tree / mutant.file
    original = path.read_text()
    began = time.perf_counter()
    try:
        path.write_text(mutant.mutated(original))
        verdict, by = _verdict(tree, mutant)
    finally:
        path.write_text(original)
        trees.put(tree)
    seconds = round(time.perf_counter() - began, 1)
    return Finding(mutant.key(), mutant.name, verdict, by, seconds)


def _verdict(tree: Path, mutant: Mutant) -> tuple[str, str]:
    try:
        run = _pytest(tree, mutant.tests, LONGEST)
    except subprocess.TimeoutExpired:
        return "killed", f"no end after {LONGEST} s"
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    by = lines[0].split(" - ")[0] if lines else run.stdout.strip()[-200:]
    verdict = VERDICTS.get(run.returncode, DID_NOT_RUN)
    return verdict, "" if verdict == "survived" else by


def _pytest(tree: Path, tests: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}:{tree / 'kernels'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    options = ["-x", "-rfE", "-p", "no:cacheprovider", "--tb=no", "--durations=0"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


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
    lines += [_line(one) for one in found if one.verdict != "killed"]
    return "\n".join(lines)


def _status(found: Iterable[Finding]) -> int:
    verdicts = {one.verdict for one in found}
    if DID_NOT_RUN in verdicts:
        return 3
    return 1 if "survived" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
