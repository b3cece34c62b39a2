"""On-policy runs: what a step reads, what a run writes, how it goes on, and what it refuses."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from fasttr.cli.commands import main
from fasttr.config.online_config import OnlineConfig
from fasttr.errors import FasttrError
from fasttr.metrics.names import ONLINE_METRICS, is_known
from fasttr.models.policy import token_logps
from fasttr.training.callbacks import Callback
from fasttr.training.online import train_online
from fasttr.training.stopping import Interrupted
from tests.killed_online import vowels
from tests.runs import FirstRollout, assert_resumed, lines, settings, steps

GRPO = {"loss_type": "dapo", "num_generations": 4}
RLOO = {"loss_type": "rloo", "num_generations": 4, "beta": 0.1}


def config_of(workspace, folder, **changes):
    common = {
        "train_batch_size": 8,
        "max_completion_length": 6,
        "max_length": None,
        "reward_funcs": ["given"],
        "gradient_checkpointing": False,
        "seed": 1,
    }
    return OnlineConfig(**{**settings(workspace, folder), **common, **changes})


def online(workspace, folder, reward=vowels, callbacks=(), **changes):
    changes = {**GRPO, **changes}
    config = config_of(workspace, folder, **changes)
    return train_online(config, reward_funcs=[reward], callbacks=callbacks)


class Watch(Callback):
    """Keeps the collector of a run, and stops it when told to."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def on_train_begin(self, run):
        self.run = run

    def on_step(self, run, metrics):
        if run.step == self.stop_after:
            run.ask("stop")


def test_a_rollout_is_a_function_of_its_number(workspace, tmp_path):
    found = []

    class Twice(Watch):
        def on_train_begin(self, run):
            found.extend(run.collector.collect(number) for number in (3, 3, 4))

    online(workspace, tmp_path / "run", callbacks=[Twice()], max_steps=1)
    texts = [experience.rollout.texts for experience in found]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 4


def test_old_log_probs_are_bitwise_those_of_the_first_step(workspace, tmp_path):
    checked = []

    class Compare(Watch):
        def on_train_begin(self, run):
            experience = run.collector.collect(0)
            for within in range(2):
                for batch in run.collector.packs(experience.rollout, within):
                    logp = token_logps(run.policy, batch, 0.8)
                    inputs = experience.inputs(batch, logp, slice(None), slice(None))
                    assert torch.equal(inputs.logp, inputs.old_logp)
                    checked.append(len(logp))

    changes = {"steps_per_generation": 2, "temperature": 0.8}
    online(workspace, tmp_path / "run", callbacks=[Compare()], max_steps=1, **changes)
    assert sum(checked) > 20


def test_packed_log_probs_are_those_of_the_model_at_the_sampling_temperature(workspace, tmp_path):
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(workspace / "model").eval()

    class Compare(Watch):
        def on_train_begin(self, run):
            experience = run.collector.collect(0)
            trees = experience.rollout.trees
            for tree, old in zip(trees, experience.old_logp, strict=True):
                ours = old.split([len(ids) for ids in tree.completions])
                for ids, logp in zip(tree.completions, ours, strict=True):
                    whole = torch.from_numpy(np.concatenate([tree.prompt_ids, ids])).long()[None]
                    logits = causal_lm(whole).logits[0, len(tree.prompt_ids) - 1 : -1] / 0.8
                    wanted = logits.log_softmax(-1).gather(1, whole[0, -len(ids) :, None])[:, 0]
                    torch.testing.assert_close(logp, wanted.detach(), rtol=1e-4, atol=1e-4)

    changes = {**RLOO, "temperature": 0.8}
    online(workspace, tmp_path / "run", callbacks=[Compare()], max_steps=1, **changes)


def test_rloo_takes_the_kl_off_the_reward(workspace, tmp_path):
    """The reference is another model; advantages are typed again from the log-probs."""
    first = FirstRollout()
    reference = str(workspace / "reference")
    changes = {**RLOO, "ref_model_name_or_path": reference}
    online(workspace, tmp_path / "run", callbacks=[first], max_steps=1, **changes)
    experience = first.experience
    rewards = np.array(vowels(None, experience.rollout.texts))
    kl = []
    trees = experience.rollout.trees
    for tree, old, ref in zip(trees, experience.old_logp, experience.ref_logp, strict=True):
        ratio = (old - ref).split([len(ids) for ids in tree.completions])
        kl += [float(part.sum()) for part in ratio]
    used = (rewards - 0.1 * np.array(kl)).reshape(-1, 4)
    wanted = used - (used.sum(axis=1, keepdims=True) - used) / 3
    np.testing.assert_allclose(experience.advantage.numpy(), wanted.reshape(-1), atol=1e-5)
    assert np.abs(kl).max() > 1e-2
    assert experience.metrics["kl"] == pytest.approx(sum(kl) / experience.rollout.lengths.sum())


def test_all_tokens_of_a_rollout_count_alike(workspace, tmp_path):
    """dapo: a step is divided by the tokens of its rollout over the number of steps, as in TRL."""
    first = FirstRollout()
    changes = {"steps_per_generation": 2, "max_completion_length": 100, "learning_rate": 0.0}
    online(workspace, tmp_path / "run", callbacks=[first], max_steps=2, **changes)
    experience = first.experience
    lengths = experience.rollout.lengths
    assert abs(lengths[:8].sum() - lengths[8:].sum()) > 4
    losses = -(experience.advantage.numpy() * lengths).reshape(2, 8).sum(axis=1)
    wanted = losses / (lengths.sum() / 2)
    assert [line["loss"] for line in steps(tmp_path / "run")] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", [GRPO, RLOO])
def test_the_reward_rises(workspace, tmp_path, method):
    changes = {**method, "train_batch_size": 32, "max_steps": 20, "learning_rate": 3e-3}
    online(workspace, tmp_path / "run", lr_scheduler_type="constant", **changes)
    rewards = [line["reward"] for line in steps(tmp_path / "run")]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.12


RESUMED = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 12,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "beta": 0.05,
    "ref_update": "soft",
    "ref_update_every": 3,
    "logging_steps": 3,
}


@pytest.fixture(scope="module")
def uninterrupted(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "run"
    online(workspace, folder, **RESUMED)
    return folder


def test_a_checkpoint_is_written_where_a_rollout_is_used_up(uninterrupted):
    names = {path.name for path in uninterrupted.glob("checkpoint-*")}
    assert names == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}


@pytest.mark.parametrize("calls", [2, 3])
def test_dying_while_a_rollout_is_made_costs_nothing_but_it(
    workspace, tmp_path, uninterrupted, calls
):
    """What a reward function raises leaves the folder as a kill would."""
    made = []

    def dies(completions, **columns):
        made.append(1)
        if len(made) == calls:
            raise MemoryError
        return vowels(None, completions)

    dies.__name__ = "vowels"
    with pytest.raises(MemoryError):
        online(workspace, tmp_path / "run", dies, **RESUMED)
    online(workspace, tmp_path / "run", resume_from_checkpoint=True, **RESUMED)
    assert_resumed(tmp_path / "run", uninterrupted)


def test_a_signal_saves_and_the_run_goes_on(workspace, tmp_path, uninterrupted):
    made = []

    def signals(completions, **columns):
        made.append(1)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return vowels(None, completions)

    signals.__name__ = "vowels"
    with pytest.raises(Interrupted):
        online(workspace, tmp_path / "run", signals, **RESUMED)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    online(workspace, tmp_path / "run", resume_from_checkpoint=True, **RESUMED)
    assert_resumed(tmp_path / "run", uninterrupted)


def test_after_a_hard_update_the_kl_begins_at_zero(workspace, tmp_path):
    changes = {**RLOO, "ref_update": "hard", "ref_update_every": 3, "max_steps": 5}
    online(workspace, tmp_path / "run", **changes)
    kl = [line["kl"] for line in steps(tmp_path / "run")]
    assert kl[0] == kl[3] == 0
    assert min(abs(kl[i]) for i in (1, 2, 4)) > 1e-6
    assert [line["ref/updates"] for line in steps(tmp_path / "run")] == [0, 0, 0, 1, 1]


def test_completions_that_did_not_end(workspace, tmp_path):
    changes = {"missing_eos_score": -1.0, "mask_truncated_completions": True, "max_steps": 1}
    changes["max_completion_length"] = 100
    first = FirstRollout()
    online(workspace, tmp_path / "run", callbacks=[first], train_batch_size=32, **changes)
    experience = first.experience
    unfinished = ~experience.rollout.finished
    assert 0 < unfinished.sum() < len(unfinished)
    assert experience.keep.numpy().tolist() == (~unfinished).astype(float).tolist()
    rewards = np.array(vowels(None, experience.rollout.texts))
    rewards[unfinished] = -1
    assert experience.metrics["reward"] == pytest.approx(rewards.mean())
    assert experience.metrics["completions/clipped_ratio"] == pytest.approx(unfinished.mean())
    ended = experience.rollout.lengths[~unfinished]
    assert experience.metrics["completions/mean_terminated_length"] == pytest.approx(ended.mean())


def test_columns_of_the_data_reach_the_function(workspace, tmp_path):
    seen = {}

    def reads(prompts, completions, completion_ids, chosen, **others):
        seen.update(prompts=prompts, chosen=chosen, others=set(others))
        assert all(len(ids) <= 6 for ids in completion_ids)
        return [None if i % 4 else 1.0 for i in range(len(prompts))]

    online(workspace, tmp_path / "run", reads, max_steps=1)
    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    chosen_of = {row["prompt"]: row["chosen"] for row in rows}
    assert [chosen_of[prompt] for prompt in seen["prompts"]] == seen["chosen"]
    assert seen["prompts"][0] == seen["prompts"][3] != seen["prompts"][4]
    assert seen["others"] == {"rejected"}
    # A prompt with one reward has no baseline: nothing is learned from it.
    assert steps(tmp_path / "run")[0]["grad_norm"] == 0


def test_the_table_of_metrics_and_the_lines_of_runs_hold_each_other(
    workspace, tmp_path, uninterrupted
):
    names = {name for line in lines(uninterrupted) for name in line} - {"step", "event"}
    assert {name for name in names if not is_known(name)} == set()
    listed = {one.name.replace("NAME", "vowels") for one in ONLINE_METRICS if one.when != "ppo"}
    assert listed <= names


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_generations": 1}, "num_generations: got 1; wanted a whole number from 2"),
        ({"train_batch_size": 6}, "multiple of num_generations 4"),
        ({"reward_funcs": None}, "reward_funcs: missing"),
        ({"reward_funcs": ["nothing.here:f"]}, "cannot import 'nothing.here'"),
        ({"reward_funcs": ["json:nothing"]}, "'json' has no function 'nothing'"),
        ({"reward_funcs": ["nowhere"]}, "no folder here and no module:function"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights: got 2 for 1 sources"),
        ({"ref_update": "hard"}, "ref_update: got hard with beta 0"),
        ({"temperature": 0.0}, "temperature: got 0.0; wanted a number above 0"),
        ({"max_completion_length": 10_000}, "wanted room for a prompt"),
        ({"simpo_gamma": 1.0}, "simpo_gamma: got 1.0; runs on rollouts do not read it"),
        ({"eval_strategy": "steps"}, "eval_strategy: a run on rollouts has no split"),
        ({"train_batch_size": 4000}, "a rollout takes 1000 prompts, and there are 24"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(workspace, tmp_path, changes, told):
    with pytest.raises(FasttrError) as raised:
        online(workspace, tmp_path / "run", **changes)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (lambda completions, **_: [0.0], "returned 1 rewards; wanted 8"),
        (lambda completions, **_: ["much"] * 8, "returned 'much' for completion 0"),
        (lambda completions, **_: [float("inf")] * 8, "returned inf"),
        (lambda completions, **_: [None] * 8, "for 3 rollouts in a row"),
    ],
)
def test_a_reward_function_that_is_wrong_is_named(workspace, tmp_path, reward, told):
    reward.__name__ = "wrong"
    with pytest.raises(FasttrError, match=told):
        online(workspace, tmp_path / "run", reward)


def test_a_yaml_of_trl_runs(workspace, tmp_path, capsys):
    yaml = tmp_path / "rloo.yaml"
    yaml.write_text(
        f"model_name_or_path: {workspace / 'model'}\n"
        f"dataset_name: {workspace / 'train.jsonl'}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        "reward_funcs: [tests.killed_online.vowels]\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2\n"
        "generation_batch_size: 16\nnum_generations: 4\nmax_completion_length: 5\n"
        "max_steps: 2\nlogging_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\n"
        "save_strategy: 'no'\ndisable_tqdm: true\nlog_completions: true\nuse_vllm: false\n"
    )
    main(["rloo", "--config", str(yaml)])
    told = capsys.readouterr().out
    assert "a rollout of 16 (4 prompts) feeds 2 steps" in told
    assert "log_completions: ignored" in told
    assert "rewards/tests.killed_online.vowels/mean" in steps(tmp_path / "run")[0]
    with pytest.raises(SystemExit) as stopped:
        main(["rloo", "--config", str(yaml), "--use_vllm", "true"])
    assert stopped.value.code == 2
    assert "use_vllm: got 'true'; completions are drawn by transformers" in capsys.readouterr().err
