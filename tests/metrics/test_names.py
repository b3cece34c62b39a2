"""The table of metrics and the lines of real runs hold each other."""

from __future__ import annotations

import pytest

from fasttr.metrics.names import NAMES, is_known
from tests.runs import lines, run

# Beside numbers a line has its step, and says of a move of the reference that it is one.
BESIDE_METRICS = {"step", "event"}
# Written where the device's peak is known, which is a GPU's.
OF_A_GPU = {"perf/mfu"}
RUNS = {
    "pairs": {"ref_update": "soft", "ref_update_every": 1},
    "pairs without a reference": {"loss_type": "simpo"},
    "unpaired": {"loss_type": "kto", "ref_update": "hard", "ref_update_every": 1},
    "sft": {"loss_type": "sft"},
}


@pytest.fixture(scope="module")
def written(workspace, tmp_path_factory) -> dict[str, set[str]]:
    """The keys of the lines of each run, two steps and an evaluation long."""
    keys = {}
    for name, changes in RUNS.items():
        folder = tmp_path_factory.mktemp("names")
        run(
            workspace,
            folder,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            eval_dataset_name=str(workspace / "test.jsonl"),
            **changes,
        )
        keys[name] = {key for line in lines(folder) for key in line} - BESIDE_METRICS
    return keys


@pytest.mark.parametrize("name", RUNS)
def test_every_key_of_a_run_is_in_the_table(written, name):
    assert len(written[name]) > 15
    assert {key for key in written[name] if not is_known(key)} == set()


def test_every_name_of_the_table_is_written_by_some_run(written):
    assert NAMES - set().union(*written.values()) == OF_A_GPU
