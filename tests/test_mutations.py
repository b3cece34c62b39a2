"""The mutants fit the code that they are of. `python -m tests.mutations` says who notices them."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache

from tests.mutations import read_mutants
from tests.places import ROOT

MUTANTS = read_mutants()


def test_a_mutant_changes_one_place_and_is_still_python():
    for mutant in MUTANTS:
        mutated = mutant.mutated((ROOT / mutant.file).read_text())
        compile(mutated, mutant.file, "exec", dont_inherit=True)


def test_the_tests_that_a_mutant_names_exist():
    for mutant in MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            file, _, function = test.partition("::")
            assert (ROOT / file).exists(), mutant.name
            assert not function or function in functions_of(file), mutant.name


def test_names_of_mutants_differ():
    assert max(Counter(mutant.name for mutant in MUTANTS).values()) == 1


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
