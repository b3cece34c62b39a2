"""On the generated task, from a model that is fitted to it: the gold reward rises."""

import numpy as np
import pytest

from bench.paper.ocrm_pool import Settings, supervised
from fasttr.config.online_config import DEFAULTS, OnlineConfig
from fasttr.toy.task import prompts, write_jsonl
from fasttr.training.online import train_online
from tests.runs import steps

METHODS = {
    "rloo": {"normalize_advantages": True, "num_generations": 4, "beta": 0.01},
    "grpo": {"num_generations": 4},
    "ppo": {"num_iterations": 2, "beta": 0.01},
}


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return supervised(Settings(sft_steps=150), tmp_path_factory.mktemp("gold"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_gold_rises_by_a_tenth_in_sixty_rollouts(sft, tmp_path, method, seed):
    write_jsonl([{"prompt": one} for one in prompts(2000, seed)], tmp_path / "prompts.jsonl")
    values = {**DEFAULTS[method], **METHODS[method]}
    config = OnlineConfig(
        **values,
        model_name_or_path=str(sft),
        dataset_name=str(tmp_path / "prompts.jsonl"),
        output_dir=str(tmp_path / "run"),
        reward_funcs=["gold"],
        train_batch_size=64,
        max_steps=60 * values.get("num_iterations", 1),
        learning_rate=4e-4,
        lr_scheduler_type="constant",
        max_completion_length=40,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
    )
    train_online(config)
    rewards = [line["reward"] for line in steps(tmp_path / "run")]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:5]) + 0.1
