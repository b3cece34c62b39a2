"""The log-probs that are left of a reference."""

from __future__ import annotations

import math

import pytest
import torch

from fasttr.errors import FasttrError
from fasttr.packing.layout import pack
from fasttr.reference.logp_table import LogpTable, fill_logps
from tests.tiny import alone_logps, packed_tiny, random_trees, tiny_model

SHAPES = [(3, 4, 2), (2, 5, 1), (6, 1, 3)]


def test_rows_come_back_as_they_were_put_and_unknown_ones_are_refused():
    table = LogpTable(4, 2)
    table.put([2, 0], torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    assert table.get([0, 2]).tolist() == [-3.0, -4.0, -1.0, -2.0]
    assert table.known_rows().tolist() == [0, 2]
    assert table.lacks([0, 1])
    assert not table.lacks([2])
    with pytest.raises(RuntimeError, match="before the reference's log-probs of it are known"):
        table.get([0, 1])
    table.clear()
    assert table.lacks([0])


def test_a_row_of_which_half_is_known_is_not_known():
    table = LogpTable(2, 2)
    table.values[0, 1] = -1.0
    assert table.lacks([0])
    assert len(table.known_rows()) == 0


def test_every_pack_is_scored_once_and_the_last_one_too():
    trees = random_trees(SHAPES)
    model = packed_tiny()
    table = LogpTable(3, 2)
    calls = []
    packs = [pack([trees[1]]), pack([trees[0]]), pack([trees[2]])]
    fill_logps(model, packs[:2], table, lambda: calls.append(len(table.known_rows())))
    assert calls == [0, 1]  # one pack late
    scored = []
    logps = model.logps
    model.logps = lambda batch: scored.append(batch.rows) or logps(batch)
    fill_logps(model, packs, table)
    assert scored == [(2,)]
    want = alone_logps(tiny_model(), trees).detach()
    torch.testing.assert_close(table.get([0, 1, 2]), want, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_log_prob_that_is_not_finite_is_one_line_that_names_its_row(broken):
    table = LogpTable(9, 2)
    with pytest.raises(FasttrError, match=r"log-probs of row 7 .*; wanted finite ones") as raised:
        table.put([3, 7], torch.tensor([-1.0, -2.0, -3.0, broken]))
    assert str(broken) in str(raised.value)
    assert table.lacks([3])
