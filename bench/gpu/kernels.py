"""The ops on this device: their own tests, compiled; memory that is poisoned; repeats bit for
bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fasttr_kernels import multi_tensor_lerp_

from bench.gpu.notes import Notes, Task, python_path
from bench.gpu.process import ROOT
from bench.head_problem import LEAVES, make_problem
from bench.head_providers import PROVIDERS, gradients
from bench.shapes import SHAPES

REPEATS = 3
TESTS = "tests/kernels"
FOR_OTHER_CHIPS = "tests/kernels/test_aot.py"  # compiles without a GPU, for three kinds of them
# At toy sizes one file shows that the tests can be started from here.
ONE_FILE = "tests/kernels/test_chunks.py"


def run(task: Task) -> None:
    with _poisoned_memory():
        _head_repeats(task)
        _lerp_repeats(task)
    _own_tests(task)


def _head_repeats(task: Task) -> None:
    shape = SHAPES["tiny" if task.dry else "qwen2.5-0.5b"]
    leaf = LEAVES["bf16" if task.device.type == "cuda" else "fp32"]
    tokens = 64 if task.dry else 5000
    problem = make_problem(
        shape.vocabulary, shape.hidden, tokens, reference=True, device=task.device, leaf=leaf
    )
    attempt = PROVIDERS["fasttr"].prepare(problem)
    first = gradients(attempt, problem)
    tensors = [x.clone() for x in first if x is not None]
    task.notes.check(
        "the head reads nothing that it has not written",
        all(bool(torch.isfinite(x).all()) for x in tensors),
    )
    same = True
    for _ in range(REPEATS - 1):
        again = [x for x in gradients(attempt, problem) if x is not None]
        same &= _equal(tensors, again)
    task.notes.check("the head repeats bit for bit", same)


def _equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _lerp_repeats(task: Task) -> None:
    sizes = SHAPES["tiny" if task.dry else "qwen2.5-0.5b"].tensors()
    for rounding in ("nearest", "stochastic"):
        found: list[list[torch.Tensor]] = []
        for _ in range(REPEATS):
            make = torch.Generator(task.device).manual_seed(0)
            drawn = [torch.randn(size, generator=make, device=task.device) for size in sizes]
            references = [x.bfloat16() for x in drawn]
            policies = [x + 0.1 for x in drawn]
            multi_tensor_lerp_(references, policies, 0.3, rounding=rounding, seed=7)
            found.append(references)
        same = all(_equal(found[0], other) for other in found[1:])
        task.notes.check(f"the reference update repeats bit for bit, {rounding}", same)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Memory that nothing was written to reads as NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def _own_tests(task: Task) -> None:
    """pytest on the kernels' tests, which run compiled where there is a GPU."""
    results = task.out / "junit.xml"
    command = [sys.executable, "-m", "pytest", ONE_FILE if task.dry else TESTS]
    command += ["-p", "no:cacheprovider", f"--junitxml={results}", f"--ignore={FOR_OTHER_CHIPS}"]
    if not task.dry and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling
    environment = os.environ | {"PYTHONPATH": python_path(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    _read_results(results, task.notes)


def _read_results(path: Path, notes: Notes) -> None:
    if not path.is_file():
        notes.check("the kernels' tests ran", False, "pytest wrote no results")
        return
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    notes.figure("tests that passed", len(cases) - len(failed) - len(skipped), digits=6)
    notes.figure("tests that were skipped", len(skipped), digits=6)
    notes.check("the kernels' tests ran", len(cases) > len(skipped))
    for case in failed:
        notes.check(str(case.get("name")), False, _message_of(case))


def _message_of(case: ElementTree.Element) -> str:
    """The first line of what pytest says of a failure."""
    found = case.find("failure")
    if found is None:
        found = case.find("error")
    message = "" if found is None else found.get("message") or found.text or ""
    return message.strip().partition("\n")[0][:200]
