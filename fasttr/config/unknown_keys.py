"""Keys that are neither fasttr's nor TRL's: what their writer may have meant."""

from __future__ import annotations

from fasttr.config.train_config import TrainConfig
from fasttr.config.trl_table import TABLE
from fasttr.errors import did_you_mean
from fasttr.settings import settings_of

# What people of other tools write, with what it is here.
_OTHER_WORDS = {
    "device": "a run takes the GPU when there is one; use_cpu: true keeps it on the CPU",
    "model": "a file of settings is flat: write model_name_or_path: NAME",
    "dataset": "a file of settings is flat: write dataset_name: NAME",
    "data": "a file of settings is flat: write dataset_name: NAME",
    "batch_size": "write train_batch_size, rows per optimizer step",
    "lr": "write learning_rate",
    "epochs": "write num_train_epochs",
    "alpha": "write ref_update_alpha, with ref_update: soft",
    "model_args": "a file of settings is flat: write its keys without model_args",
    "training_args": "a file of settings is flat: write its keys without training_args",
}


def unknown_key(key: str) -> str:
    """What is wrong with that key of a file or a command line, and what to write."""
    settings = settings_of(TrainConfig)
    base = key.removeprefix("no_")
    if base != key and (base in TABLE or base in settings):
        return f"unknown key {key!r}: write {base}: false"
    if key in _OTHER_WORDS:
        return f"unknown key {key!r}: {_OTHER_WORDS[key]}"
    return f"unknown key {key!r}{did_you_mean(key, [*settings, *TABLE])}; --help lists all"
