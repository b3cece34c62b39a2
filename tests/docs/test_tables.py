"""The tables that readers see are those of the code."""

from pathlib import Path

import pytest

from docs.tables import filled, formats_table, losses_table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["REFERENCE.md", "ON_POLICY.md"])
def test_tables_are_made_from_the_code(name):
    page = (ROOT / name).read_text()
    assert page == filled(page), f"run: python -m docs.tables {name}"
    assert page.count("<!--") >= 10


def test_every_loss_has_an_equation_and_a_source():
    from fasttr.losses import LOSSES

    rows = losses_table().splitlines()[2:]
    assert len(rows) == len(LOSSES)
    for name, row in zip(LOSSES, rows, strict=True):
        assert "arXiv:" in row or name in ("sigmoid_norm", "sft"), row
        assert any(sign in row for sign in "cuhdx"), row


def test_every_format_is_one_that_the_reader_knows():
    assert {
        row.split("|")[3].split(":")[0].strip() for row in formats_table().splitlines()[2:]
    } == {
        "paired",
        "unpaired",
        "messages",
        "hh_rlhf",
        "paired_ids",
        "unpaired_ids",
    }
