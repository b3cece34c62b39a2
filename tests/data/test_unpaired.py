"""Unpaired rows: pairs taken apart in TRL's order, and each row's mismatched completion."""

from __future__ import annotations

import numpy as np
import pytest

from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from fasttr.data.unpaired import Unpaired


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# Prompts of 1, 2 and 3 tokens; the tokens of a completion say whose it is.
PAIRS = ListTrees(
    [
        Tree(0, ids(1), (ids(10, 10), ids(15)), weight=0.5),
        Tree(1, ids(2, 2), (ids(20), ids(25, 25, 25)), weight=2.0),
        Tree(2, ids(3, 3, 3), (ids(30, 30, 30, 30), ids(35)), weight=1.0),
    ]
)


def completions_of(rows: Unpaired) -> list[list[list[int]]]:
    return [[part.tolist() for part in rows[row].completions] for row in range(len(rows))]


def test_pairs_are_taken_apart_chosen_first():
    rows = Unpaired(PAIRS, labels=None, block=None, max_length=None)
    assert completions_of(rows) == [
        [[10, 10]],
        [[20]],
        [[30, 30, 30, 30]],
        [[15]],
        [[25, 25, 25]],
        [[35]],
    ]
    assert rows.labels.tolist() == [True] * 3 + [False] * 3
    assert [rows[row].label for row in range(6)] == rows.labels.tolist()
    assert [rows[row].weight for row in range(6)] == [0.5, 2.0, 1.0] * 2
    assert [rows[row].row for row in range(6)] == list(range(6))
    assert rows.positions.tolist() == [0, 1, 2] * 2
    assert rows.prompt_lengths.tolist() == [1, 2, 3] * 2
    assert rows.largest_id == 35


def test_pairs_are_taken_apart_in_blocks_of_1000():
    many = ListTrees([Tree(i, ids(1), (ids(2, i), ids(3, i))) for i in range(1002)])
    rows = Unpaired(many, labels=None, block=None, max_length=None)
    assert rows.positions[[0, 999, 1000, 1999, 2000, 2001, 2002, 2003]].tolist() == [
        0,
        999,
        0,
        999,
        1000,
        1001,
        1000,
        1001,
    ]
    assert rows.labels[[0, 999, 1000, 1999, 2000, 2001, 2002, 2003]].tolist() == [
        *[True, True, False, False],
        *[True, True, False, False],
    ]


def test_a_row_gets_the_completion_of_the_row_before_it_and_the_first_that_of_the_last():
    """Blocks of four of six rows: the last one has two."""
    rows = Unpaired(PAIRS, labels=None, block=4, max_length=None)
    own = [[10, 10], [20], [30, 30, 30, 30], [15], [25, 25, 25], [35]]
    mismatched = [own[3], own[0], own[1], own[2], own[5], own[4]]
    assert completions_of(rows) == [list(pair) for pair in zip(own, mismatched, strict=True)]
    assert rows.completion_lengths.tolist() == [
        [len(a), len(b)] for a, b in zip(own, mismatched, strict=True)
    ]


def test_a_mismatched_completion_is_cut_to_the_room_that_its_prompt_leaves():
    """Five tokens in all; row 3 has a prompt of one, and the completion of row 2 has four."""
    rows = Unpaired(PAIRS, labels=None, block=6, max_length=5)
    assert rows[3].completions[1].tolist() == [30, 30, 30, 30]
    assert rows[5].completions[1].tolist() == [25, 25]
    assert rows.completion_lengths[5].tolist() == [1, 2]
    assert (rows.prompt_lengths + rows.completion_lengths[:, 1]).max() == 5
    assert [len(part) for part in rows[5].completions] == rows.completion_lengths[5].tolist()


def test_rows_of_one_completion_keep_their_order_and_labels():
    single = ListTrees([tree._replace(completions=tree.completions[:1]) for tree in PAIRS.trees])
    labels = np.array([False, True, False])
    rows = Unpaired(single, labels=labels, block=3, max_length=None)
    assert completions_of(rows) == [
        [[10, 10], [30, 30, 30, 30]],
        [[20], [10, 10]],
        [[30, 30, 30, 30], [20]],
    ]
    assert rows.labels.tolist() == labels.tolist()
    with pytest.raises(ValueError, match="unpaired rows without labels"):
        Unpaired(single, labels=None, block=3, max_length=None)


def test_the_fingerprint_follows_the_block_and_the_cut():
    found = {
        Unpaired(PAIRS, labels=None, block=block, max_length=cut).fingerprint
        for block in (None, 2, 3)
        for cut in (None, 5)
    }
    assert len(found) == 6
    assert all(PAIRS.fingerprint in one for one in found)
