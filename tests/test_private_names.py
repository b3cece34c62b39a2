"""Nobody outside a file touches its names that begin with an underscore."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.places import ROOT

ROOTS = {
    "fasttr": ROOT,
    "bench": ROOT,
    "docs": ROOT,
    "tests": ROOT,
    "fasttr_kernels": ROOT / "kernels",
}
# The same words elsewhere: a `datasets.Dataset` has a _fingerprint of its own.
OF_OTHERS = {("fasttr/data/load.py", "_fingerprint")}


class Names(NamedTuple):
    """Private names that a file gives to something of its own."""

    of_module: set[str]  # functions, classes, variables
    of_objects: set[str]  # methods and attributes


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def files_of(*packages: str) -> list[Path]:
    return [path for name in packages for path in sorted((ROOTS[name] / name).rglob("*.py"))]


def names_of(tree: ast.Module) -> Names:
    of_module, of_objects = set(), set()
    for node in tree.body:
        of_module |= {target for target in targets_of(node) if is_private(target)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                of_objects |= {target for target in targets_of(inner) if is_private(target)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_own = last_word(node.value) in ("self", "cls") and is_private(node.attr)
            of_objects |= {node.attr} if is_own else set()
    return Names(of_module, of_objects)


def targets_of(node: ast.stmt) -> set[str]:
    """The names that a statement of a module or of a class defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        stored = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
        return {inner.id for inner in stored if isinstance(inner.ctx, ast.Store)}
    return set()


def modules_in(tree: ast.Module) -> set[str]:
    """Words of a file that may mean a module of ours."""
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.split(".")[0] in ROOTS]
            words |= {(alias.asname or alias.name).split(".")[-1] for alias in ours}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOTS:
            words |= {alias.asname or alias.name for alias in node.names}
    return words


def last_word(node: ast.expr) -> str | None:
    """`c` of `a.b.c`, `a` of `a`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def touched_in(tree: ast.Module, ours: Names) -> Iterator[tuple[int, str]]:
    """(line, name) of private names of ours that a file imports, reads or replaces."""
    modules = modules_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOTS:
            for alias in node.names:
                if is_private(alias.name):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            is_of_module = last_word(node.value) in modules and node.attr in ours.of_module
            if is_of_module or node.attr in ours.of_objects:
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and last_word(node.func) in ("setattr", "getattr"):
            # What is replaced is named in a string, with its module before it or beside it.
            words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            for word in words:
                last = word.split(".")[-1] if isinstance(word, str) else ""
                if last in ours.of_module | ours.of_objects:
                    yield node.lineno, last


def touches(files: list[Path], root: Path) -> list[str]:
    """FILE:LINE NAME of private names that are touched outside the files that define them."""
    trees = {path: ast.parse(path.read_text()) for path in files}
    names = {path: names_of(tree) for path, tree in trees.items()}
    ours = Names(
        set().union(*(own.of_module for own in names.values())),
        set().union(*(own.of_objects for own in names.values())),
    )
    found = []
    for path, tree in trees.items():
        where = str(path.relative_to(root))
        own = names[path].of_module | names[path].of_objects
        for line, name in touched_in(tree, ours):
            if name not in own and (where, name) not in OF_OTHERS:
                found.append(f"{where}:{line} {name}")
    return found


def test_private_names_stay_in_their_files():
    files = files_of(*ROOTS)
    assert len(files) > 150
    assert touches(files, ROOT) == []


@pytest.mark.parametrize(
    "use",
    [
        "from fasttr.one import _hidden",
        "import fasttr.one\nfasttr.one._hidden()",
        "from fasttr import one as two\ntwo._hidden()",
        "def f(thing):\n    return thing._kept",
        "setattr(one, '_hidden', None)",
        "monkeypatch.setattr('fasttr.one._hidden', None)",
    ],
)
def test_a_touch_that_is_put_in_is_found(tmp_path, use):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("def _hidden(): ...\nclass A:\n    def __init__(self): self._kept = 1\n")
    two.write_text("x = 1\n")
    assert touches([one, two], tmp_path) == []
    two.write_text(use + "\n")
    (found,) = touches([one, two], tmp_path)
    assert found.startswith("two.py:")
