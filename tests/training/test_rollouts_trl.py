"""What is made of a rollout, against TRL's own trainers that are given its completions: rewards,
advantages, and their metrics."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasttr.config.online_config import OnlineConfig
from fasttr.training.online import train_online
from tests.runs import FirstRollout, settings
from tests.trl_trainers import trl_online

# Of four prompts with four completions each: all known, one alone, none, equal ones.
FIRST = [1.0, 0.5, 2.0, -1.0, None, 0.7, None, None, None, None, None, None, 0.25, 0.25, 0.25, 0.25]
SECOND = [0.3, None, 0.1, 4.0, None, None, None, None, None, None, None, None, 1.0, 1.0, 1.0, 1.0]
CASES = {
    "grpo": ("GRPO", {"loss_type": "grpo"}),
    "batch": ("GRPO", {"loss_type": "dapo", "scale_rewards": "batch"}),
    "none": ("GRPO", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "rloo": ("RLOO", {"loss_type": "rloo", "beta": 0.1}),
    "normalized": ("RLOO", {"loss_type": "rloo", "beta": 0.1, "normalize_advantages": True}),
    "clipped": ("RLOO", {"loss_type": "rloo", "beta": 0.0, "reward_clip_range": [-0.4, 1.5]}),
    "masked": (
        "RLOO",
        {"loss_type": "rloo", "beta": 0.1, "mask_truncated_completions": True},
    ),
}


def first(prompts, completions, **columns):
    return FIRST


def second(prompts, completions, **columns):
    return SECOND


def ours(workspace, folder, options):
    """The prompts of a rollout, and what is made of it."""
    begun = FirstRollout()
    config = OnlineConfig(
        **settings(workspace, folder, max_steps=1, train_batch_size=16, max_length=None),
        ref_model_name_or_path=str(workspace / "reference"),
        num_generations=4,
        max_completion_length=40,
        reward_funcs=[f"tests.training.test_rollouts_trl:{name}" for name in ("first", "second")],
        reward_weights=[1.0, 0.5],
        gradient_checkpointing=False,
        seed=2,
        **options,
    )
    train_online(config, callbacks=[begun])
    return begun.prompts, begun.experience


def theirs(workspace, folder, kind, options, prompts, experience):
    """What TRL makes of the same completions, and its metrics."""
    made = trl_online(
        kind,
        workspace / "model",
        workspace / "model",
        folder,
        [first, second],
        per_device_train_batch_size=16,
        max_completion_length=40,
        reward_weights=[1.0, 0.5],
        **{name: x for name, x in options.items() if kind == "GRPO" or name != "loss_type"},
    )
    if made.ref_model is not None:
        reference = AutoModelForCausalLM.from_pretrained(workspace / "reference")
        made.ref_model.load_state_dict(reference.state_dict())
    trees = experience.rollout.trees
    own_ids = [tree.prompt_ids.tolist() for tree in trees for _ in range(4)]
    drawn = [ids.tolist() for tree in trees for ids in tree.completions]

    def generate(prompt_ids, *args, **kwargs):
        assert prompt_ids == own_ids
        return (drawn, None) if kind == "GRPO" else drawn

    made._generate_single_turn = generate
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(4)]
    output = made._generate_and_score_completions(rows)
    return output["advantages"], {name: x[-1] for name, x in made._metrics["train"].items()}


@pytest.mark.parametrize("case", CASES)
def test_rewards_advantages_and_metrics_are_trls(workspace, tmp_path, case):
    kind, options = CASES[case]
    prompts, experience = ours(workspace, tmp_path / "ours", options)
    advantage, metrics = theirs(workspace, tmp_path / "trl", kind, options, prompts, experience)
    torch.testing.assert_close(experience.advantage, advantage, rtol=1e-4, atol=1e-5)
    assert float(advantage.abs().max()) > 0.1
    shared = metrics.keys() - {"num_tokens"}
    assert len(shared) == 14 + ("kl" in metrics)
    for name in shared:
        assert experience.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    assert 0 < metrics["completions/clipped_ratio"] < 1
    assert metrics["frac_reward_zero_std"] == 0.25 or case == "batch" or "kl" in metrics
