"""Trees that are already here, as rows of a run."""

from __future__ import annotations

import numpy as np
import pytest

from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from tests.tiny import random_trees

SHAPES = [(3, 4, 2), (0, 1, 5)]


def test_a_list_of_trees_says_their_lengths_labels_places_and_largest_id():
    trees = [tree._replace(row=7, label=tree.row == 0) for tree in random_trees(SHAPES)]
    rows = ListTrees(trees)
    assert rows.prompt_lengths.tolist() == [3, 0]
    assert rows.completion_lengths.tolist() == [[4, 2], [1, 5]]
    assert rows.labels.tolist() == [True, False]
    assert rows.positions.tolist() == [0, 1]
    assert [tree.row for tree in rows] == [0, 1]
    assert rows.largest_id == max(
        int(part.max())
        for tree in trees
        for part in (tree.prompt_ids, *tree.completions)
        if len(part)
    )


def test_trees_of_different_numbers_of_completions_are_refused():
    with pytest.raises(ValueError, match=r"got trees of \[1, 2\] completions"):
        ListTrees(random_trees([(3, 4, 2), (3, 4)]))
    with pytest.raises(ValueError, match="at least one tree"):
        ListTrees([])


def test_the_fingerprint_follows_everything_that_a_loss_reads():
    base = random_trees(SHAPES)
    first = base[0]
    changed = {
        "weight": first._replace(weight=2.0),
        "label": first._replace(label=False),
        "a token": first._replace(completions=(first.completions[0] + 1, first.completions[1])),
        "the boundary": Tree(
            0,
            first.prompt_ids[:-1],
            (np.concatenate([first.prompt_ids[-1:], first.completions[0]]), first.completions[1]),
        ),
        "a number": first._replace(per_completion={"margin": np.array([0.5, 1.0])}),
    }
    found = {name: ListTrees([tree, base[1]]).fingerprint for name, tree in changed.items()}
    assert len({ListTrees(base).fingerprint, *found.values()}) == len(changed) + 1
    assert ListTrees(random_trees(SHAPES)).fingerprint == ListTrees(base).fingerprint
