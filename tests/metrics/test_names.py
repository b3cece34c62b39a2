"""The table of metrics and the lines of real runs hold each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from fasttr.metrics.names import NAMES, is_known
from tests.runs import lines, run
from tests.tiny import tiny_config

# Beside numbers a line has its step, and says of a move of the reference that it is one.
BESIDE_METRICS = {"step", "event"}
# Written where the device's peak is known, which is a GPU's.
OF_A_GPU = {"perf/mfu"}
RUNS = {
    "pairs": {"ref_update": "soft", "ref_update_every": 1},
    "pairs without a reference": {"loss_type": "simpo"},
    "unpaired": {"loss_type": "kto", "ref_update": "hard", "ref_update_every": 1},
    "sft": {"loss_type": "sft"},
    "experts": {"model_name_or_path": "mixtral"},
}


def folder_of(arch: str, workspace: Path, folder: Path) -> Path:
    """A tiny model of an architecture, with the workspace's tokenizer."""
    shutil.copytree(workspace / "model", folder)
    AutoModelForCausalLM.from_config(tiny_config(arch, vocab_size=300)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(workspace, tmp_path_factory) -> dict[str, set[str]]:
    """The keys of the lines of each run, two steps and an evaluation long."""
    keys = {}
    for name, changes in RUNS.items():
        folder = tmp_path_factory.mktemp("names")
        arch = changes.get("model_name_or_path")
        if arch is not None:
            model = folder_of(arch, workspace, tmp_path_factory.mktemp("models") / arch)
            changes = {**changes, "model_name_or_path": str(model)}
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
