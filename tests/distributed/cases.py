"""Runs whose numbers do not depend on how many processes make them, nor on how weights lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import evaluations, settings, steps

MOVING = {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 3}
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
EXPERTS = {"model_name_or_path": "experts", "router_aux_loss_coef": 0.01, "max_steps": 4}
# Packs of a few rows each, so that a step of 8 is several packs on every rank.
CASES = {
    "hard": {"ref_update": "hard", "ref_update_every": 2},
    "soft": {**MOVING, "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    "fixed, 2 epochs": {"num_train_epochs": 2, "max_steps": -1, "train_batch_size": 7},
    "kto": {"loss_type": "kto", **MOVING, "eval_strategy": "steps", "eval_steps": 3},
    "kto in groups": {"loss_type": "kto", "group_size": 4, "mismatch_size": 2, "max_steps": 3},
    "kto_paired": {"loss_type": "kto_paired", "max_steps": 3},
    "aot with ld_alpha": {"loss_type": "aot", "ld_alpha": 0.4, "max_steps": 3},
    "list": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "max_steps": 3},
    "ipo with ld_alpha": {"loss_type": "ipo", "ld_alpha": 0.4, "train_batch_size": 5},
    "adapter": {**ADAPTER, **MOVING},
    "fewer rows than ranks": {"train_batch_size": 1, "max_steps": 3},
    "bf16": {"bf16": True, **MOVING},
    "bf16 adapter": {"bf16": True, **ADAPTER, **MOVING},
    "named reference": {"ref_model_name_or_path": "reference", "max_steps": 3},
    "tied, recomputed": {"model_name_or_path": "tied", **MOVING, "gradient_checkpointing": True},
    "experts": {**EXPERTS, **MOVING},
    "experts adapter": {**EXPERTS, **MOVING, **ADAPTER, "lora_target_modules": "q_proj"},
    "kept end": {"max_length": 24, "truncation_mode": "keep_end", "max_steps": 3},
    # Rows go through the layers in parts, of which another rank may have more.
    "long rows": {"max_tokens_per_batch": 30, **MOVING, "eval_strategy": "steps", "eval_steps": 2},
    "long rows of kto": {
        "model_name_or_path": "tied",
        "loss_type": "kto",
        "max_tokens_per_batch": 20,
        "gradient_checkpointing": True,
        "activation_offloading": True,
        "max_steps": 3,
    },
    # Every weight moves by its gradient.
    "gradient": {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1},
}
# Products of other packs round otherwise in bf16, on one process too.
ROUNDED = {"bf16": 2e-2, "bf16 adapter": 2e-2}
ROUNDED["gradient"] = 2e-6


def case_settings(workspace: Path, folder: Path, name: str) -> dict[str, Any]:
    common = {
        "train_batch_size": 8,
        "max_tokens_per_batch": 100,
        "eval_dataset_name": str(workspace / "test.jsonl"),
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
    }
    found = settings(workspace, folder / name, **{**common, **CASES[name]})
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        if key in CASES[name]:
            found[key] = str(workspace / CASES[name][key])
    return found


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight that a run has written at its end."""
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def assert_same_numbers(expected_folder: Path, folder: Path, name: str) -> None:
    """Lines of metrics, evaluations and final weights of a case, as far as sums may differ."""
    rounded = ROUNDED.get(name, 1e-5)
    for expected, got in zip(steps(expected_folder), steps(folder), strict=True):
        for key in ("loss", "grad_norm", "ref/distance", "kl", "rewards/margins"):
            if key in expected:
                bound = rounded * max(abs(expected[key]), 1.0 if key != "loss" else 0.0)
                assert abs(got[key] - expected[key]) <= bound, (expected["step"], key)
        assert got["num_tokens"] == expected["num_tokens"]
    for expected, got in zip(evaluations(expected_folder), evaluations(folder), strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key] == pytest.approx(value, rel=1e-5, abs=2e-5), key
    assert_same_weights(expected_folder, folder, rounded)


def assert_same_weights(expected_folder: Path, folder: Path, bound: float) -> None:
    expected, got = trained(expected_folder), trained(folder)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert (got[key] - value).abs().max() < bound, key
