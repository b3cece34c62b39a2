"""Every key of TRL's GRPOConfig and RLOOConfig runs or is named, and our defaults are TRL's."""

import dataclasses
from pathlib import Path

import pytest

from fasttr.cli.ocrm import parse_ocrm
from fasttr.cli.online import parse_online
from fasttr.config.ocrm_config import PolicyRun
from fasttr.config.online_config import DEFAULTS, OnlineConfig
from fasttr.config.online_keys import KEYS, OWN_DEFAULTS, generation_steps, take_out
from fasttr.config.trl_table import TABLE
from fasttr.errors import FasttrError
from fasttr.settings import settings_of

CONFIGS = {"grpo": "GRPOConfig", "rloo": "RLOOConfig"}


def fields_of(command):
    import trl

    fields = dataclasses.fields(getattr(trl, CONFIGS[command]))
    return {field.name: field for field in fields}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_key_is_a_setting_or_is_in_a_table(command):
    known = {*settings_of(OnlineConfig), *KEYS, *TABLE, "generation_batch_size"}
    assert set(fields_of(command)) - known == set()


@pytest.mark.parametrize("command", CONFIGS)
def test_defaults_are_trls(command):
    """But for what a run names anew here: rows of a step, and log intervals."""
    settings = settings_of(OnlineConfig)
    different = {"steps_per_generation"}  # none there: as many micro-batches as a step has
    own = {"learning_rate", "num_generations", "max_completion_length", "temperature", "beta"}
    own |= {"epsilon", "epsilon_high", "num_iterations", "shuffle_dataset", "reward_weights"}
    if command == "grpo":
        own |= {"loss_type", "delta", "importance_sampling_level", "scale_rewards"}
        own |= {"use_bias_correction_kl", "mask_truncated_completions"}
    else:
        own |= {"normalize_advantages", "reward_clip_range"}
    fields = fields_of(command)
    for name in own - different:
        ours = DEFAULTS[command].get(name, settings[name].default)
        assert ours == fields[name].default, name
    for name, key in KEYS.items():
        if name in fields:
            assert key.default == fields[name].default, name
    for name, default in OWN_DEFAULTS.items():
        assert fields[name].default == default


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.is_refused])
def test_a_refused_key_is_named(name):
    with pytest.raises(FasttrError, match=f"{name}: got 'something'"):
        take_out({name: "something"})
    values = {name: KEYS[name].default}
    assert take_out(values) == []
    assert values == {}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"train_batch_size": 8, "steps_per_generation": 3}, 3),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, None),
        (
            {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "steps_per_generation": 6,
            },
            3,
        ),
        ({"per_device_train_batch_size": 4, "generation_batch_size": 16}, 4),
        ({"train_batch_size": 16, "generation_batch_size": 32}, 2),
    ],
)
def test_a_rollout_in_trls_measures(given, steps):
    values = dict(given)
    generation_steps(values)
    assert values.get("steps_per_generation") == steps
    assert "generation_batch_size" not in values


def test_a_rollout_that_ends_inside_a_step_is_refused():
    with pytest.raises(FasttrError, match="steps_per_generation: got 3; wanted a multiple of 2"):
        generation_steps({"gradient_accumulation_steps": 2, "steps_per_generation": 3})


def test_a_command_keeps_its_own_losses(tmp_path):
    words = ["--reward_funcs", "gold", "--loss_type"]
    assert parse_online("grpo", [*words, "luspo"]).loss_type == "luspo"
    with pytest.raises(FasttrError, match="loss_type: got rloo with fasttr grpo"):
        parse_online("grpo", [*words, "rloo"])
    with pytest.raises(FasttrError, match="loss_type: got 'sapo'; wanted one of"):
        parse_online("grpo", [*words, "sapo"])


@pytest.mark.parametrize(
    ("word", "scale"),
    [("none", "none"), ("false", "none"), ("true", "group"), ("batch", "batch")],
)
def test_rewards_may_be_left_as_they_are(word, scale):
    """The word none is a value here, and TRL's truth values are read."""
    words = ["--scale_rewards", word]
    assert parse_online("grpo", ["--reward_funcs", "gold", *words]).scale_rewards == scale
    data = ["--model_name_or_path=m", "--dataset_name=d", "--judge_dataset_name=j", "--arms=fixed"]
    run = PolicyRun(1)
    config = parse_ocrm([*data, "--algorithm", "grpo", "--train_batch_size", "8", *words])
    assert config.policy(Path("p"), "m", None, "gold", 0, run).scale_rewards == scale
    assert OnlineConfig(reward_funcs=["gold"], scale_rewards=False).scale_rewards == "none"
    with pytest.raises(FasttrError, match="scale_rewards: got 'some'; wanted one of group"):
        parse_online("grpo", ["--reward_funcs", "gold", "--scale_rewards", "some"])
