"""Stages of a reward model and a policy, on a tiny model: what arms share, what a kill costs, and
what weights are."""

import dataclasses
import json
import signal

import numpy as np
import pytest

from fasttr.cli.ocrm import parse_ocrm
from fasttr.config.ocrm_config import OcrmConfig
from fasttr.errors import FasttrError
from fasttr.evaluation.judge import label_pairs
from fasttr.losses.ratios import RatioSettings, pair_weights
from fasttr.rollouts.confident import confident_pair, same_text
from fasttr.training.ocrm import run_ocrm
from fasttr.training.ocrm_steps import GOLD, LOGPS, WEIGHTS, Steps
from fasttr.training.pair_rows import PAIRS, read_pairs
from fasttr.training.stages import DONE, Store
from tests.killed_online import killed_in_stages, vowels
from tests.runs import read_rows, write_rows


def by_first_letter(prompt, texts):
    """Samples agree where both begin before m, or both do not."""
    return [text[:1] < "m" for text in texts]


def values_of(workspace, folder, **changes):
    values = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "train.jsonl"),
        "judge_dataset_name": str(workspace / "test.jsonl"),
        "label": "tests.killed_online:vowels",
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
    dpo = {"learning_rate": 3e-3, "save_steps": 2, "train_batch_size": 8, **common}
    return {"rl": rl, "rm": rm, "dpo": dpo, **values}


def config_of(workspace, folder, **changes):
    return OcrmConfig(**values_of(workspace, folder, **changes))


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
        assert lines[0] == {name: lines[1][name] for name in lines[0]}
        assert lines[1] == lines[2]
        assert lines[1]["gold_difference"] == lines[1]["gold_difference_stderr"] == 0
    assert results[0]["kl"] == 0
    last = [line for line in results if line["stage"] == 2]
    assert len({line["gold"] for line in last}) > 1
    assert min(line["kl"] for line in last) > 1e-4


def test_weights_are_those_of_the_log_probs_that_are_stored(done):
    folder, results = done
    q = np.load(next(folder.glob("q-*")) / LOGPS)
    p = np.load(next(folder.glob("p-2-*")) / LOGPS)
    wanted = pair_weights(p, q, RatioSettings())
    found = np.load(next(folder.glob("ratios-2-*")) / WEIGHTS)
    np.testing.assert_array_equal(found, wanted.weights)
    assert np.abs(p - q).max() > 1e-3
    line = next(line for line in results if line["arm"] == "weighted" and line["stage"] == 2)
    assert line["ess"] == pytest.approx(wanted.effective_size)


def test_pairs_are_labelled_by_the_gold_reward(done, workspace):
    from fasttr.models.load import load_tokenizer

    folder, _ = done
    tokenizer = load_tokenizer(str(workspace / "model"))
    lines = (next(folder.glob("pairs-*")) / PAIRS).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert 10 < len(rows) <= 40
    for row in rows:
        texts = [
            tokenizer.decode(row[side], skip_special_tokens=True)
            for side in ("chosen_ids", "rejected_ids")
        ]
        better, worse = vowels(None, texts)
        assert better > worse


def test_differences_between_arms_are_paired_by_prompt(done):
    folder, results = done
    golds = {}
    for line in results:
        for path in folder.glob(f"judge-{line['stage']}-*/{GOLD}"):
            gold = np.load(path)
            if gold.mean() == pytest.approx(line["gold"], abs=1e-12):
                golds[line["arm"], line["stage"]] = gold
    difference = golds["weighted", 2] - golds["fixed", 2]
    line = next(x for x in results if (x["arm"], x["stage"]) == ("weighted", 2))
    assert line["gold_difference"] == pytest.approx(difference.mean())
    stderr = difference.std(ddof=1) / len(difference) ** 0.5
    assert line["gold_difference_stderr"] == pytest.approx(stderr)
    assert stderr > 0


# Each child goes on where the one before it was killed, and is killed in another kind of step.
KILLS = {
    "training": (("fit", 3), ("update", 3)),
    "all else": (("draw", 1), ("mark", 3), ("score", 2), ("judge", 1)),
}


@pytest.mark.parametrize(
    "kills", [KILLS["training"], pytest.param(KILLS["all else"], marks=pytest.mark.slow)]
)
def test_killed_in_a_step_then_resumed_changes_no_number(workspace, tmp_path, done, kills):
    values = values_of(workspace, tmp_path / "run", arms=["weighted"])
    for what, calls in kills:
        ended = killed_in_stages(values, what, calls)
        assert ended.status == -signal.SIGKILL, (what, ended.text)
    found = run_ocrm(OcrmConfig(**values))
    wanted = [line for line in done[1] if line["arm"] == "weighted"]
    differs = ("gold_difference", "gold_difference_stderr")
    assert found == [
        {name: x for name, x in line.items() if name not in differs} for line in wanted
    ]


OTHERS = ["fixed", "fixed@sft", "fresh", "unweighted", "synthetic", "ppo-rlhf", "dpo", "wpo"]


@pytest.fixture(scope="module")
def others(workspace, done):
    """The other arms, in the same folder."""
    cluster = "tests.training.test_ocrm:by_first_letter"
    config = config_of(workspace, done[0], arms=OTHERS, cluster=cluster)
    return {line["arm"]: line for line in run_ocrm(config) if line["stage"] == 2}


def test_every_arm_goes_through_the_same_judge(done, others):
    assert set(others) == set(OTHERS)
    assert len({line["gold"] for line in others.values()}) == len(OTHERS)
    for arm, line in others.items():
        assert {"gold", "kl", "length", "reward/accuracy", "labels", "episodes"} <= set(line), arm
        assert line["kl"] > 1e-4
    # A second stage draws 32 completions, a baseline as many as both.
    assert {others[arm]["episodes"] for arm in ("fixed", "synthetic", "ppo-rlhf")} == {64}
    assert others["dpo"]["episodes"] == others["wpo"]["episodes"] == 0
    assert others["fresh"]["labels"] > others["fixed"]["labels"]


def test_arms_with_a_fixed_reference_share_the_first_stage(done, others):
    folder, _ = done
    assert len(list(folder.glob("policy-1-*"))) == 1
    assert others["fixed@sft"]["gold"] != others["fixed"]["gold"]


def test_wpo_is_dpo_with_weights(done, others):
    folder, _ = done
    for name, weighs in (("dpo", False), ("wpo", True)):
        (found,) = folder.glob(f"{name}-*/train_config.json")
        told = json.loads(found.read_text())
        assert (told["use_weighting"], told["loss_type"]) == (weighs, "sigmoid")


def test_synthetic_pairs_are_of_samples_that_agree(done, others):
    folder, _ = done
    (step,) = folder.glob("synthetic-*")
    rows = read_pairs(step)
    assert 0 < len(rows) == others["synthetic"]["synthetic"] < 24
    assert all(row["chosen_ids"] != row["rejected_ids"] for row in rows)
    # Its policy starts again from SFT and takes what is left of the updates.
    (policy,) = folder.glob("policy-synthetic-*/train_config.json")
    told = json.loads(policy.read_text())
    assert told["max_steps"] == 4
    assert told["model_name_or_path"].endswith("/model")


def test_a_confident_pair():
    rng = np.random.default_rng(0)
    score = np.array([0.1, 0.9, 0.5, 2.0])
    assert confident_pair(["a", "a", "a", "b"], score, 0.5, rng) == (1, 3)
    assert confident_pair(["a", "a", "b", "b"], score, 0.5, rng) is None
    assert confident_pair(["a", "a", "a", "a"], score, 0.5, rng) is None
    rejected = {confident_pair(["a", "b", "a", "c"], score, 0.4, rng)[1] for _ in range(30)}
    assert rejected == {1, 3}
    assert same_text("", [" A  b", "a B", "ab"]) == ["a b", "a b", "ab"]


def test_controls_are_judged_on_the_same_samples(workspace, done):
    config = config_of(workspace, done[0], arms=["weighted"], judge_controls=True)
    line = run_ocrm(config)[-1]
    names = ("reward", "unweighted", "shuffled", "reward_1")
    assert len({line[f"{name}/excess_loss"] for name in names}) == 4
    wanted = [x for x in done[1] if (x["arm"], x["stage"]) == ("weighted", 2)]
    assert line["reward/excess_loss"] == wanted[0]["reward/excess_loss"]


def test_a_changed_setting_is_named(workspace, tmp_path, capsys):
    from fasttr.training.ocrm import CONFIG, announce_changes

    before = config_of(workspace, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG).write_text(json.dumps(dataclasses.asdict(before)))
    announce_changes(dataclasses.replace(before, stages=5, ratio_tau=0.5))
    told = capsys.readouterr().out
    assert "made with another configuration (stages, ratio_tau)" in told
    announce_changes(before)
    assert capsys.readouterr().out == ""


def test_equal_policies_have_equal_log_probs_bit_for_bit(workspace, tmp_path):
    """No update: the policy of the first stage is the writer, read from another folder."""
    config = config_of(workspace, tmp_path / "run", arms=["weighted"])
    config = dataclasses.replace(config, rl={**config.rl, "learning_rate": 0.0})
    results = run_ocrm(config)
    folder = tmp_path / "run"
    q = np.load(next(folder.glob("q-*")) / LOGPS)
    p = np.load(next(folder.glob("p-2-*")) / LOGPS)
    np.testing.assert_array_equal(p, q)
    assert results[-1]["ess"] == pytest.approx(len(p))
    assert results[-1]["kl"] == 0


def test_an_arm_ends_where_its_weights_are_worth_too_little(workspace, tmp_path, capsys, done):
    config = config_of(workspace, done[0], arms=["weighted"], stop_ess=1e6)
    results = run_ocrm(config)
    assert [line["stage"] for line in results] == [0, 1]
    assert "stops before stage 2" in capsys.readouterr().out


class Kept(Steps):
    """Keeps the rows of its reward model, which is not fitted."""

    def fit_reward(self, folder, rows, seed):
        self.rows = rows
        return {}


def test_pairs_that_are_given_are_read_as_if_they_had_been_drawn(workspace, tmp_path):
    """They end with EOS; what the template writes behind it only a reward model reads."""
    given = read_rows(workspace / "train.jsonl")
    for row in given:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    data = str(write_rows(tmp_path / "chat.jsonl", given))
    config = config_of(workspace, tmp_path, dataset_name=data, pairs_dataset_name=data)
    steps = Kept(config, Store(tmp_path))
    pairs = steps.pairs("pairs", None)
    decode, eos = steps.tokenizer.decode, steps.tokenizer.eos_token
    rows = read_pairs(pairs.folder)
    assert len(rows) == len(given) == pairs.facts["pairs"]
    for row, wanted in zip(rows, given, strict=True):
        asked = steps.tokenizer.apply_chat_template(
            wanted["prompt"], add_generation_prompt=True, tokenize=False
        )
        assert decode(row["prompt_ids"]) == asked
        assert decode(row["chosen_ids"]) == wanted["chosen"][0]["content"] + eos
        assert decode(row["rejected_ids"]) == wanted["rejected"][0]["content"] + eos

    steps.reward("reward-1", pairs)
    for row, wanted in zip(steps.rows, given, strict=True):
        whole = steps.tokenizer.apply_chat_template(
            [*wanted["prompt"], *wanted["rejected"]], tokenize=False
        )
        assert decode(row["prompt_ids"] + row["rejected_ids"]) == whole
        assert whole.endswith(eos + "\n")
        assert row["weight"] == 1


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
        ({"pairs_temperature": 0.7}, "ratio_temperature: got 1.0, and pairs are written at 0.7"),
        ({"cluster": "json:nothing"}, "cluster: 'json' has no function 'nothing'"),
        ({"dpo": {"loss_type": "ipo"}}, "dpo_loss_type: got 'ipo'; a stage sets it"),
        ({"arms": ["ppo-rlhf"], "ppo": {"lam": 2.0}}, "lam: got 2.0; wanted a number from 0 to 1"),
        ({"rl": {"max_completion_length": 5000}}, "wanted room for a prompt"),
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
    more = parse_ocrm([*words, "--ppo_lam", "0.9", "--dpo_beta", "0.5", "--ratio_tokens", "8"])
    assert (more.ppo, more.dpo, more.ratio_tokens) == ({"lam": 0.9}, {"beta": 0.5}, 8)
    with pytest.raises(FasttrError, match="unknown key 'rm_learning_rat'"):
        parse_ocrm([*words, "--rm_learning_rat", "1"])
    with pytest.raises(FasttrError, match="train_batch_size: got 6 completions a step"):
        parse_ocrm([*words, "--train_batch_size", "6"])
