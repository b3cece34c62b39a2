"""Stages of a reward model and a policy, on a tiny model: what arms share, what a kill costs, and
what weights are."""

import dataclasses
import json

import numpy as np
import pytest

from fasttr.cli.ocrm import parse_ocrm
from fasttr.config.ocrm_config import OcrmConfig
from fasttr.errors import FasttrError
from fasttr.evaluation.judge import label_pairs
from fasttr.losses.ratios import RatioSettings, pair_weights
from fasttr.training import ocrm
from fasttr.training.ocrm import run_ocrm
from fasttr.training.stages import DONE


def vowels(prompts, completions, **columns):
    return [sum(text.count(v) for v in "aeiou") / 4 for text in completions]


def config_of(workspace, folder, **changes):
    values = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "train.jsonl"),
        "judge_dataset_name": str(workspace / "test.jsonl"),
        "label": "tests.training.test_ocrm:vowels",
        "output_dir": str(folder),
        "arms": ["fixed", "weighted", "shuffled"],
        "stages": 2,
        "updates_per_stage": 4,
        "pairs": 40,
        "pairs_per_prompt": 2,
        "stop_ess": 0,
        "use_cpu": True,
        **changes,
    }
    common = {"disable_tqdm": True, "logging_steps": 2, "bf16": False, "max_length": None}
    rl = {
        "train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 3e-3,
        "save_steps": 2,
        **common,
    }
    rm = {"learning_rate": 3e-3, "save_steps": 2, **common}
    return OcrmConfig(**values, rl=rl, rm=rm)


@pytest.fixture(scope="module")
def done(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ocrm") / "run"
    return folder, run_ocrm(config_of(workspace, folder))


def steps_of(folder):
    names = [path.parent.name.rpartition("-")[0] for path in folder.glob(f"*/{DONE}")]
    return sorted(names)


def test_arms_share_the_steps_that_they_have_in_common(done):
    folder, _ = done
    assert steps_of(folder) == sorted(
        ["pairs", "q", "reward-1", "judge-0", "policy-1", "judge-1", "p-2", "ratios-2"]
        # From the second reward model on arms part; its policy is another one for each.
        + ["reward-2"] * 2
        + ["policy-2"] * 3
        + ["judge-2"] * 3
    )


def test_every_arm_has_a_line_for_every_stage_and_begins_alike(done):
    _, results = done
    assert [(line["arm"], line["stage"]) for line in results] == [
        (arm, stage) for arm in ("fixed", "weighted", "shuffled") for stage in (0, 1, 2)
    ]
    for stage in (0, 1):
        lines = [{**x, "arm": ""} for x in results if x["stage"] == stage]
        assert lines[0] == lines[1] == lines[2]
    assert results[0]["kl"] == 0
    last = [line for line in results if line["stage"] == 2]
    assert len({line["gold"] for line in last}) > 1
    assert min(line["kl"] for line in last) > 1e-4


def test_weights_are_those_of_the_log_probs_that_are_stored(done):
    folder, results = done
    q = np.load(next(folder.glob("q-*")) / ocrm.LOGPS)
    p = np.load(next(folder.glob("p-2-*")) / ocrm.LOGPS)
    wanted = pair_weights(p, q, RatioSettings())
    found = np.load(next(folder.glob("ratios-2-*")) / ocrm.WEIGHTS)
    np.testing.assert_array_equal(found, wanted.weights)
    assert np.abs(p - q).max() > 1e-3
    line = next(line for line in results if line["arm"] == "weighted" and line["stage"] == 2)
    assert line["ess"] == pytest.approx(wanted.effective_size)


def test_pairs_are_labelled_by_the_gold_reward(done, workspace):
    from fasttr.models.load import load_tokenizer

    folder, _ = done
    tokenizer = load_tokenizer(str(workspace / "model"))
    lines = (next(folder.glob("pairs-*")) / ocrm.PAIRS).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert 10 < len(rows) <= 40
    for row in rows:
        texts = [
            tokenizer.decode(row[side], skip_special_tokens=True)
            for side in ("chosen_ids", "rejected_ids")
        ]
        better, worse = vowels(None, texts)
        assert better > worse


@pytest.mark.parametrize("calls", [1, 3])
def test_dying_inside_a_step_changes_no_number(workspace, tmp_path, done, monkeypatch, calls):
    """A policy's training dies at its first step of all, or of its second stage."""
    from fasttr.training import online

    original, count = online.policy_step, []

    def dies(run, experience, within):
        count.append(1)
        if len(count) == 2 * calls:
            raise MemoryError
        return original(run, experience, within)

    config = config_of(workspace, tmp_path / "run", arms=["weighted"])
    monkeypatch.setattr(online, "policy_step", dies)
    with pytest.raises(MemoryError):
        run_ocrm(config)
    monkeypatch.setattr(online, "policy_step", original)
    found = run_ocrm(config)
    wanted = [line for line in done[1] if line["arm"] == "weighted"]
    assert found == wanted


def test_equal_policies_have_equal_log_probs_bit_for_bit(workspace, tmp_path):
    """No update: the policy of the first stage is the writer, read from another folder."""
    config = config_of(workspace, tmp_path / "run", arms=["weighted"])
    config = dataclasses.replace(config, rl={**config.rl, "learning_rate": 0.0})
    results = run_ocrm(config)
    folder = tmp_path / "run"
    q = np.load(next(folder.glob("q-*")) / ocrm.LOGPS)
    p = np.load(next(folder.glob("p-2-*")) / ocrm.LOGPS)
    np.testing.assert_array_equal(p, q)
    assert results[-1]["ess"] == pytest.approx(len(p))
    assert results[-1]["kl"] == 0


def test_an_arm_ends_where_its_weights_are_worth_too_little(workspace, tmp_path, capsys, done):
    config = config_of(workspace, done[0], arms=["weighted"], stop_ess=1e6)
    results = run_ocrm(config)
    assert [line["stage"] for line in results] == [0, 1]
    assert "stops before stage 2" in capsys.readouterr().out


def test_labels_with_noise_are_bradley_terry():
    rng = np.random.default_rng(0)
    first, second = np.full(20_000, 0.3), np.full(20_000, 0.1)
    preferred, labelled = label_pairs(first, second, 0.2, rng)
    assert labelled.all()
    assert preferred.mean() == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)
    preferred, labelled = label_pairs(np.array([1.0, 0, 2]), np.array([0.0, 0, 3]), 0, rng)
    assert preferred.tolist() == [True, False, False]
    assert labelled.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arms": ["heavy"]}, "arms: got \\['heavy'\\]; wanted some of fixed, unweighted"),
        ({"label": "nowhere"}, "no folder here and no module:function"),
        ({"ratio_alpha": 2.0}, "ratio_alpha: got 2.0; wanted a number from 0 to 1"),
        ({"pairs": 4000}, "pairs: got 4000, 2 of a prompt, and there are 24 prompts"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(workspace, tmp_path, changes, told):
    with pytest.raises(FasttrError, match=told):
        run_ocrm(config_of(workspace, tmp_path / "run", **changes))


def test_the_command_parts_its_flags(workspace):
    words = (
        f"--model_name_or_path {workspace / 'model'} --dataset_name a.jsonl "
        "--judge_dataset_name b.jsonl --arms fixed weighted --train_batch_size 16 "
        "--num_generations 4 --rm_learning_rate 1e-5 --ratio_preset ocrm-release"
    ).split()
    config = parse_ocrm(words)
    assert config.arms == ["fixed", "weighted"]
    assert config.rl == {"train_batch_size": 16, "num_generations": 4}
    assert config.rm == {"learning_rate": 1e-5}
    assert config.ratios == RatioSettings(0.1, 0.001, 0.0)
    assert config.flattens_much
    with pytest.raises(FasttrError, match="rm_output_dir: got 'x'; a stage sets it"):
        parse_ocrm([*words, "--rm_output_dir", "x"])
    with pytest.raises(FasttrError, match="unknown key 'rm_learning_rat'"):
        parse_ocrm([*words, "--rm_learning_rat", "1"])
    with pytest.raises(FasttrError, match="train_batch_size: got 6 completions a step"):
        parse_ocrm([*words, "--train_batch_size", "6"])
