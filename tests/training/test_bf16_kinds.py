"""Reward models and on-policy runs in bf16 go on bit for bit as well."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.config.online_config import OnlineConfig
from fasttr.config.reward_config import RewardConfig
from fasttr.training.online import train_online
from fasttr.training.reward import train_reward
from tests.runs import lines, same_weights, settings, steps, timeless, weights

BF16 = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "max_tokens_per_batch": 100}


def reward_model(workspace, folder, **changes):
    train_reward(RewardConfig(**settings(workspace, folder, **BF16, **changes)))


def on_policy(workspace, folder, **changes):
    own = {
        "train_batch_size": 8,
        "max_completion_length": 6,
        "max_length": None,
        "reward_funcs": ["given"],
        "gradient_checkpointing": False,
        "loss_type": "dapo",
        "num_generations": 4,
        "beta": 0.1,
        "ref_update": "soft",
        "ref_update_every": 2,
    }
    config = OnlineConfig(**settings(workspace, folder, **{**BF16, **own, **changes}))
    train_online(config, reward_funcs=[vowels])


def vowels(prompts, completions, **columns):
    return [sum(text.count(v) for v in "aeiou") / 4 for text in completions]


@pytest.mark.parametrize("kind", [reward_model, on_policy])
def test_a_run_in_bf16_resumes_bit_for_bit_and_leaves_a_bf16_folder(workspace, tmp_path, kind):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    kind(workspace, whole)
    assert {x.dtype for x in weights(whole).values()} == {torch.bfloat16}
    assert len({line["loss"] for line in steps(whole)}) > 1
    shutil.copytree(whole, resumed)
    for later in list_checkpoints(resumed)[1:]:
        shutil.rmtree(later)
    kind(workspace, resumed, resume_from_checkpoint=True)
    assert same_weights(resumed, whole)
    assert list(map(timeless, lines(resumed))) == list(map(timeless, lines(whole)))
    last = list_checkpoints(whole)[-1].name
    for name in ("optimizer", "remainders"):
        path = f"{last}/fasttr/{name}.safetensors"
        mine, theirs = load_file(resumed / path), load_file(whole / path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
