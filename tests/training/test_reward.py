"""Runs on reward models: what they write, how they go on, and what they refuse."""

import json

import numpy as np
import pytest
import torch

from fasttr.cli import main
from fasttr.config.reward_config import RewardConfig
from fasttr.errors import FasttrError
from fasttr.metrics.names import REWARD_METRICS, is_known
from fasttr.models.reward import CALIBRATION
from fasttr.training.reward import train_reward
from tests.runs import evaluations, lines, same_weights, settings, steps, timeless


def reward_run(workspace, folder, **changes):
    return train_reward(RewardConfig(**settings(workspace, folder, **changes)))


def pairs(workspace):
    return [json.loads(line) for line in (workspace / "test.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "run"
    reward_run(
        workspace,
        folder,
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset_name=str(workspace / "test.jsonl"),
        save_strategy="steps",
        save_steps=2,
        calibration_dataset_name=str(workspace / "test.jsonl"),
    )
    return folder


def transformers_scores(folder, texts, side="right"):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    padding = "right" if side == "none" else side
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        if side == "none":
            one = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
            return torch.stack(one).numpy()
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        return model(**batch).logits[:, 0].numpy()


def test_loss_falls_and_the_folder_scores_alike_in_transformers(workspace, trained, capsys):
    losses = [line["loss"] for line in steps(trained)]
    assert np.mean(losses[-2:]) < losses[0]
    main(
        f"eval --model_name_or_path {trained} --dataset_name {workspace / 'test.jsonl'} "
        f"--use_cpu true --output_file {trained / 'measured.json'}".split()
    )
    measured = json.loads((trained / "measured.json").read_text())["metrics"]
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(trained).eos_token
    texts = {
        side: [row["prompt"] + row[side] + eos for row in pairs(workspace)]
        for side in ("chosen", "rejected")
    }
    for padding in ("left", "right", "none"):
        chosen = transformers_scores(trained, texts["chosen"], padding)
        rejected = transformers_scores(trained, texts["rejected"], padding)
        assert (chosen - rejected).mean() == pytest.approx(measured["margin"], abs=1e-4)
        assert (chosen > rejected).mean() == pytest.approx(measured["accuracy"])
        assert max(chosen.max(), rejected.max()) == pytest.approx(measured["max_reward"], abs=1e-4)
    spread = np.std(chosen - rejected, ddof=1) / np.sqrt(len(chosen))
    assert measured["margin_stderr"] == pytest.approx(spread, rel=1e-3)
    evaluation = evaluations(trained)[-1]
    assert evaluation["eval_accuracy"] == pytest.approx(measured["accuracy"])
    assert evaluation["eval_loss"] == pytest.approx(measured["loss"], abs=1e-5)


def test_the_calibration_is_the_mean_score_of_its_responses(workspace, trained):
    from transformers import AutoTokenizer

    eos = AutoTokenizer.from_pretrained(trained).eos_token
    texts = [row["prompt"] + row["chosen"] + eos for row in pairs(workspace)]
    scores = transformers_scores(trained, texts, "none")
    written = json.loads((trained / CALIBRATION).read_text())
    assert written["mean"] == pytest.approx(scores.mean(), abs=1e-4)
    assert written["std"] == pytest.approx(scores.std(), abs=1e-4)
    assert written["rows"] == 10


def test_resumed_is_uninterrupted(workspace, trained, tmp_path):
    from fasttr.training.callbacks import Callback

    class StopAfter3(Callback):
        def on_step(self, run, metrics):
            if run.step == 3:
                run.ask("stop")

    changes = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_dataset_name": str(workspace / "test.jsonl"),
        "save_strategy": "steps",
        "save_steps": 2,
    }
    config = RewardConfig(**settings(workspace, tmp_path / "run", **changes))
    train_reward(config, callbacks=[StopAfter3()])
    reward_run(workspace, tmp_path / "run", resume_from_checkpoint=True, **changes)
    assert same_weights(tmp_path / "run", trained)
    mine, wanted = (
        [timeless(line) for line in lines(folder) if "train_loss" not in line]
        for folder in (tmp_path / "run", trained)
    )
    assert mine == wanted


def test_ranked_completions_and_prompts_together(workspace, tmp_path):
    rows = [
        {"prompt": f"alpha {i % 3}?", "completions": [f" best {i}", f" fair beta {i}", " worst"]}
        for i in range(12)
    ]
    config = RewardConfig(
        **settings(
            workspace,
            tmp_path / "run",
            dataset_name=None,
            train_sampling_strategy="prompt",
            learning_rate=0.0,
            max_steps=3,
        )
    )
    train_reward(config, train_dataset=rows)
    for line in steps(tmp_path / "run"):
        # Six orders of three completions, about alike under a head that was just drawn.
        assert 1.0 < line["loss"] < 2.6
        assert line["min_reward"] <= line["mean_reward"] <= line["max_reward"]


def test_weights_of_rows_enter_the_loss_and_are_counted(workspace, tmp_path):
    data = {"dataset_name": str(workspace / "weighted.jsonl"), "learning_rate": 0.0}
    for name, column in (("with", "weight"), ("without", None)):
        reward_run(workspace, tmp_path / name, max_steps=2, weight_column=column, **data)
    weighted, plain = steps(tmp_path / "with"), steps(tmp_path / "without")
    assert weighted[0]["loss"] != plain[0]["loss"]
    assert weighted[0]["accuracy"] == plain[0]["accuracy"]
    assert 1 < weighted[0]["weights/ess"] < 4
    assert 0.25 < weighted[0]["weights/max_share"] < 1
    assert "weights/ess" not in plain[0]


def test_a_tokenizer_that_pads_with_eos_gets_another_padding_token(workspace, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    tokenizer.pad_token = tokenizer.eos_token
    AutoModelForCausalLM.from_pretrained(workspace / "model").save_pretrained(model)
    tokenizer.save_pretrained(model)
    reward_run(workspace, tmp_path / "run", model_name_or_path=str(model), max_steps=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["pad_token_id"] not in (None, tokenizer.eos_token_id)
    assert config["pad_token_id"] == AutoTokenizer.from_pretrained(tmp_path / "run").pad_token_id


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"beta": 0.2}, "beta: got 0.2; a reward model has no loss to choose"),
        ({"ref_update": "hard"}, "ref_update: got 'hard'"),
        ({"pad_token": "nowhere"}, "pad_token: 'nowhere' is no token"),
        ({"max_length": 4}, "no row is left that fits max_length"),
        ({"dataset_name": "BAD"}, "row 1 (counted from 0): margin is 'much'"),
        ({"train_sampling_strategy": "group"}, "wanted one of random, sequential, prompt"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(workspace, tmp_path, changes, told):
    if changes.get("dataset_name") == "BAD":
        rows = [
            {**row, "margin": "much" if i == 1 else "1"} for i, row in enumerate(pairs(workspace))
        ]
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"dataset_name": str(tmp_path / "bad.jsonl")}
        told = "row 0 (counted from 0): margin is '1'"
    with pytest.raises(FasttrError) as raised:
        reward_run(workspace, tmp_path / "run", **changes)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_folder_with_two_labels_or_nan_is_refused(workspace, trained, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    two = tmp_path / "two"
    shutil.copytree(trained, two, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((two / "config.json").read_text())
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (two / "config.json").write_text(json.dumps({**config, **labels}))
    with pytest.raises(FasttrError, match="num_labels 2; wanted 1"):
        reward_run(workspace, tmp_path / "run", model_name_or_path=str(two))
    (two / "config.json").write_text(json.dumps(config))
    tensors = load_file(two / "model.safetensors")
    tensors["score.weight"][0, 0] = float("nan")
    save_file(tensors, two / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FasttrError, match="NaN"):
        reward_run(workspace, tmp_path / "run", model_name_or_path=str(two))


def test_the_command_takes_trls_keys_and_refuses_those_of_losses(workspace, tmp_path, capsys):
    yaml = tmp_path / "reward.yaml"
    yaml.write_text(
        f"model_name_or_path: {workspace / 'model'}\n"
        f"dataset_name: {workspace / 'train.jsonl'}\n"
        f"output_dir: {tmp_path / 'run'}\n"
        "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\n"
        "center_rewards_coefficient: 0.01\nmax_steps: 1\nmax_length: 64\nuse_cpu: true\n"
        "bf16: false\nlogging_steps: 1\nreport_to: none\nsave_strategy: 'no'\ndisable_tqdm: true\n"
    )
    main(["reward", "--config", str(yaml)])
    assert steps(tmp_path / "run")[0]["learning_rate"] == pytest.approx(1e-4)
    with pytest.raises(SystemExit) as stopped:
        main(["reward", "--config", str(yaml), "--loss_type", "ipo"])
    assert stopped.value.code == 2
    assert "loss_type: got 'ipo'" in capsys.readouterr().err


def test_the_table_of_metrics_and_the_lines_of_runs_hold_each_other(workspace, trained, tmp_path):
    weighted = {"dataset_name": str(workspace / "weighted.jsonl"), "weight_column": "weight"}
    reward_run(workspace, tmp_path / "weighted", max_steps=1, **weighted)
    written = [*lines(trained), *lines(tmp_path / "weighted")]
    names = {name for line in written for name in line} - {"step", "event"}
    assert {name for name in names if not is_known(name)} == set()
    assert {metric.name for metric in REWARD_METRICS} <= names
