"""Settings that contradict each other."""

from __future__ import annotations

import pytest

from fasttr import TrainConfig
from fasttr.errors import FasttrError


def config(**changes) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", **changes)


@pytest.mark.parametrize("group", [{"train_batch_size": 1}, {"group_size": 1}], ids=str)
def test_a_group_of_one_row_has_no_estimate_of_kl(group):
    """Its mismatched completion would be its own."""
    with pytest.raises(FasttrError, match="got a group of 1 row with kto"):
        config(loss_type="kto", **group)
    config(loss_type="apo_zero_unpaired", **group)
    config(loss_type="kto", train_batch_size=4, group_size=2)
