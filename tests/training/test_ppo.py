"""PPO: what the critic makes of a rollout, what a step minimises, and how a run goes on."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch

from fasttr.cli.commands import main
from fasttr.cli.online import parse_online
from fasttr.config.online_config import OnlineConfig
from fasttr.config.reward_config import RewardConfig
from fasttr.errors import FasttrError
from fasttr.metrics.names import ONLINE_METRICS, is_known
from fasttr.models.policy import token_logps
from fasttr.models.reward import CALIBRATION
from fasttr.training.callbacks import Callback
from fasttr.training.online import train_online
from fasttr.training.reward import train_reward
from tests.killed_online import killed_while_generating, vowels
from tests.runs import FirstRollout, assert_resumed, same_weights, settings, steps

PPO = {
    "loss_type": "ppo",
    "num_generations": 1,
    "beta": 0.1,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "train_batch_size": 6,
    "max_completion_length": 6,
    "max_length": None,
    "reward_funcs": ["given"],
    "gradient_checkpointing": False,
    "seed": 1,
}


def values_of(workspace, folder, **changes):
    return {**settings(workspace, folder), **PPO, **changes}


def ppo(workspace, folder, reward=vowels, callbacks=(), **changes):
    config = OnlineConfig(**values_of(workspace, folder, **changes))
    return train_online(config, reward_funcs=[reward], callbacks=callbacks)


@pytest.fixture(scope="module")
def reward_folder(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "model"
    values = settings(workspace, folder, max_steps=3, max_length=None)
    train_reward(RewardConfig(**values))
    return folder


def transformers_values(folder, trees):
    """Of each token of each completion: the score at the token before it."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for tree in trees:
        for ids in tree.completions:
            whole = torch.from_numpy(np.concatenate([tree.prompt_ids, ids])).long()[None]
            with torch.no_grad():
                hidden = model.model(whole).last_hidden_state[0]
                scores = model.score(hidden)[:, 0]
            found.append(scores[len(tree.prompt_ids) - 1 : -1].numpy())
    return found


def by_completion(numbers, trees):
    parts = []
    for tree, of_prompt in zip(trees, numbers, strict=True):
        parts += [x.numpy() for x in of_prompt.split([len(ids) for ids in tree.completions])]
    return parts


CRITIQUES = {
    "plain": {},
    "k3, discounted": {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.6},
    "whitened rewards": {"whiten_rewards": True, "num_generations": 2},
}


@pytest.mark.parametrize("changes", CRITIQUES.values(), ids=CRITIQUES)
def test_advantages_are_the_equations(workspace, tmp_path, reward_folder, changes):
    """From the log-probs that are stored, the critic's values by transformers, and the rewards."""
    first = FirstRollout()
    changes = {
        "value_model_name_or_path": str(reward_folder),
        "ref_model_name_or_path": str(workspace / "reference"),
        "max_steps": 1,
        **changes,
    }
    ppo(workspace, tmp_path / "run", callbacks=[first], **changes)
    experience = first.experience
    trees = experience.rollout.trees
    gamma, lam = changes.get("gamma", 1.0), changes.get("lam", 0.95)
    values = transformers_values(reward_folder, trees)
    rewards = []
    for score, old, ref in zip(
        vowels(None, experience.rollout.texts),
        by_completion(experience.old_logp, trees),
        by_completion(experience.ref_logp, trees),
        strict=True,
    ):
        ratio = old.astype(np.float64) - ref
        kl = np.exp(-ratio) - 1 + ratio if "kl_estimator" in changes else ratio
        of_tokens = -0.1 * kl
        of_tokens[-1] += score
        rewards.append(of_tokens)
    if "whiten_rewards" in changes:
        flat = np.concatenate(rewards)
        rewards = [(r - flat.mean()) / flat.std() + flat.mean() for r in rewards]
    advantages = []
    for reward, value in zip(rewards, values, strict=True):
        after = np.append(value[1:], 0.0)
        delta = reward + gamma * after - value
        later = [
            sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t))
            for t in range(len(delta))
        ]
        advantages.append(np.array(later))
    flat = np.concatenate(advantages)
    wanted = (flat - flat.mean()) / flat.std()
    found = np.concatenate(by_completion(experience.critique.advantage, trees))
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    targets = np.concatenate(by_completion(experience.critique.target, trees))
    np.testing.assert_allclose(targets, flat + np.concatenate(values), atol=2e-4)
    assert np.abs(np.concatenate(values)).max() > 0.05
    assert np.abs(flat).max() > 0.1


def test_a_step_minimises_both_equations(workspace, tmp_path):
    """At the second pass, where ratios and values have moved; read before it, held to its line."""
    wanted = {}

    class Look(Callback):
        def on_train_begin(self, run):
            collect = run.collector.collect

            def kept(number):
                self.experience = collect(number)
                return self.experience

            run.collector.collect = kept

        def on_step(self, run, metrics):
            if run.step != 2:
                return
            experience = self.experience
            sums = np.zeros(3)
            for batch in run.collector.packs(experience.rollout, 0):
                logp = token_logps(run.policy, batch)
                inputs = experience.inputs(batch, logp, slice(None), slice(None))
                c = np.exp((logp - inputs.old_logp).double().numpy())
                a = inputs.advantage.double().numpy()
                old, target = (x.double().numpy() for x in experience.of_critic(batch))
                v = run.critic.frozen_values(batch).double().numpy()
                near = np.clip(v, old - 0.05, old + 0.05)
                sums += [
                    -np.minimum(c * a, np.clip(c, 0.95, 1.05) * a).sum(),
                    0.5 * np.maximum((v - target) ** 2, (near - target) ** 2).sum(),
                    len(a),
                ]
                wanted["moved"] = np.abs(c - 1).max()
            wanted["loss"], wanted["value_loss"] = sums[0] / sums[2], sums[1] / sums[2]

    changes = {"max_steps": 4, "epsilon": 0.05, "cliprange_value": 0.05, "learning_rate": 1e-2}
    ppo(workspace, tmp_path / "run", callbacks=[Look()], **changes)
    line = steps(tmp_path / "run")[2]
    assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
    assert line["value_loss"] == pytest.approx(wanted["value_loss"], rel=1e-5)
    assert wanted["moved"] > 0.05
    assert line["clip_ratio/region_mean"] > 0
    assert line["value_clip_ratio"] > 0


def test_the_reward_rises_and_the_critic_learns(workspace, tmp_path):
    changes = {"train_batch_size": 24, "steps_per_generation": 1, "num_iterations": 2}
    changes |= {"max_steps": 24, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    ppo(workspace, tmp_path / "run", **changes)
    found = steps(tmp_path / "run")
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.12
    explained = [line["explained_variance"] for line in found]
    assert np.mean(explained[-4:]) > np.mean(explained[:2])
    names = {name for line in found for name in line}
    assert {name for name in names if not is_known(name)} == {"step"}
    assert {one.name for one in ONLINE_METRICS if one.when == "ppo"} <= names


RESUMED = {
    "save_strategy": "steps",
    "save_steps": 4,
    "max_steps": 12,
    "kl_target": 0.5,
    "kl_horizon": 100.0,
    "ref_update": "soft",
    "ref_update_every": 3,
    "logging_steps": 3,
}


@pytest.fixture(scope="module")
def uninterrupted(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "run"
    ppo(workspace, folder, **RESUMED)
    return folder


@pytest.mark.parametrize("calls", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_while_generating_then_resumed_is_the_uninterrupted_run(
    workspace, tmp_path, uninterrupted, calls
):
    values = values_of(workspace, tmp_path / "run", **RESUMED)
    ended = killed_while_generating(values, calls)
    assert ended.status == -signal.SIGKILL, ended.text
    assert not (tmp_path / "run" / "model.safetensors").exists()
    ppo(workspace, tmp_path / "run", resume_from_checkpoint=True, **RESUMED)
    assert_resumed(tmp_path / "run", uninterrupted)
    coefficients = [line["kl_coef"] for line in steps(uninterrupted)]
    # The KL is below its target, so the coefficient falls with every rollout.
    assert coefficients == sorted(coefficients, reverse=True)
    assert coefficients[-1] < 0.096


def test_a_critic_starts_where_it_is_told(workspace, tmp_path, reward_folder):
    config = OnlineConfig(
        **values_of(workspace, tmp_path / "run", reward_funcs=[str(reward_folder)])
    )
    assert config.value_source == str(reward_folder)
    config = OnlineConfig(**values_of(workspace, tmp_path / "run"))
    assert config.value_source == str(workspace / "model")


def test_a_critic_expects_calibrated_rewards(workspace, tmp_path, reward_folder):
    folder = shutil.copytree(reward_folder, tmp_path / "calibrated")
    (folder / CALIBRATION).write_text(json.dumps({"mean": 0.7}))
    first = FirstRollout()
    changes = {"value_model_name_or_path": str(folder), "max_steps": 1}
    ppo(workspace, tmp_path / "run", callbacks=[first], **changes)
    trees = first.experience.rollout.trees
    found = np.concatenate(by_completion(first.experience.critique.value, trees))
    wanted = np.concatenate(transformers_values(reward_folder, trees)) - 0.7
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_completion_without_a_reward_is_left_out(workspace, tmp_path):
    def every_other(completions, **columns):
        return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]

    first = FirstRollout()
    ppo(workspace, tmp_path / "run", every_other, [first], max_steps=1)
    experience = first.experience
    assert experience.keep.tolist() == [1.0, 0.0] * 6
    flat = by_completion(experience.critique.advantage, experience.rollout.trees)
    of_kept = np.concatenate(flat[::2])
    assert abs(of_kept.mean()) < 1e-5
    assert of_kept.std() == pytest.approx(1, abs=1e-4)


def test_a_rollout_without_any_reward_changes_nothing(workspace, tmp_path, capsys):
    made = []

    def none_at_first(completions, **columns):
        made.append(1)
        return [None] * len(completions) if len(made) == 1 else vowels(None, completions)

    ppo(workspace, tmp_path / "run", none_at_first, max_steps=5, learning_rate=1e-3)
    assert "no source gives any reward for a rollout" in capsys.readouterr().out
    norms = [line["grad_norm"] for line in steps(tmp_path / "run")]
    assert norms[:4] == [0.0] * 4
    assert norms[4] > 0


def test_names_of_trls_former_config(workspace):
    words = (
        f"--model_name_or_path {workspace / 'model'} --dataset_name a.jsonl --reward_funcs gold "
        "--num_ppo_epochs 3 --num_mini_batches 2 --kl_coef 0.2 --cliprange 0.1 "
        "--response_length 7 --missing_eos_penalty 1.5 --per_device_train_batch_size 4 "
        "--gradient_accumulation_steps 2 --total_episodes 100 --stop_token eos --lam 0.9"
    ).split()
    config = parse_online("ppo", words)
    assert (config.num_iterations, config.steps_per_generation, config.beta) == (3, 2, 0.2)
    assert (config.epsilon, config.max_completion_length, config.lam) == (0.1, 7, 0.9)
    assert (config.train_batch_size, config.missing_eos_penalty) == (8, 1.5)
    # Seven rollouts of 16 completions hold a hundred; each feeds two steps, three times.
    assert config.max_steps == 7 * 2 * 3
    defaults = parse_online("ppo", ["--reward_funcs", "gold"])
    assert (defaults.num_iterations, defaults.beta, defaults.num_generations) == (4, 0.05, 1)
    assert (defaults.vf_coef, defaults.cliprange_value, defaults.epsilon) == (0.1, 0.2, 0.2)
    assert (defaults.gamma, defaults.lam, defaults.whiten_rewards) == (1.0, 0.95, False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--stop_token_id 5", "stop_token_id: got '5'; a completion ends at"),
        ("--adap_kl_ctrl true", "adap_kl_ctrl: got 'true'; a name of an older trainer: set kl_tar"),
        ("--mini_batch_size 4", "mini_batch_size: got '4'; follows from the other sizes"),
        ("--kl_coef 0.1 --beta 0.2", "kl_coef: got '0.1' beside beta '0.2'"),
        ("--loss_type dapo", "loss_type: got dapo with fasttr ppo; it is a loss of fasttr grpo"),
        ("--normalize_advantages true", "normalize_advantages: got True; ppo does not read it"),
        ("--kl_target 6 --beta 0", "kl_target: got it with beta 0"),
        ("--vf_coef 0", "vf_coef: got 0.0; wanted a number above 0"),
        (
            "--missing_eos_score -1 --missing_eos_penalty 1",
            "missing_eos_penalty: got it beside missing_eos_score",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(words, told):
    with pytest.raises(FasttrError) as raised:
        parse_online("ppo", ["--reward_funcs", "gold", *words.split()])
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_critic_is_ppos_alone():
    with pytest.raises(FasttrError, match=r"vf_coef: got 0\.5; only fasttr ppo"):
        parse_online("grpo", ["--reward_funcs", "gold", "--vf_coef", "0.5"])


def test_the_command_runs(workspace, tmp_path, reward_folder, capsys):
    yaml = tmp_path / "ppo.yaml"
    yaml.write_text(
        f"sft_model_path: {workspace / 'model'}\n"
        f"reward_model_path: {reward_folder}\n"
        f"dataset_name: {workspace / 'train.jsonl'}\noutput_dir: {tmp_path / 'run'}\n"
        "per_device_train_batch_size: 4\nnum_ppo_epochs: 2\ntotal_episodes: 8\n"
        "response_length: 5\nlogging_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "save_strategy: 'no'\ndisable_tqdm: true\nmissing_eos_penalty: 1.0\n"
        "local_rollout_forward_batch_size: 8\n"
    )
    main(["ppo", "--config", str(yaml)])
    told = capsys.readouterr().out
    assert f"critic: from {reward_folder}" in told
    assert "local_rollout_forward_batch_size: ignored" in told
    assert len(steps(tmp_path / "run")) == 4


def test_under_bf16_a_run_that_was_killed_goes_on_alike(workspace, tmp_path):
    """The critic's weights are two bytes and a remainder there; a checkpoint holds their sum."""
    changes = {**RESUMED, "bf16": True, "max_steps": 8}
    ppo(workspace, tmp_path / "whole", **changes)
    made = []

    def dies(completions, **columns):
        made.append(1)
        if len(made) == 2:
            raise MemoryError
        return vowels(None, completions)

    dies.__name__ = "vowels"
    with pytest.raises(MemoryError):
        ppo(workspace, tmp_path / "run", dies, **changes)
    ppo(workspace, tmp_path / "run", resume_from_checkpoint=True, **changes)
    assert same_weights(tmp_path / "run", tmp_path / "whole")
