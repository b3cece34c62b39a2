"""The recipes of corrected reward models load, and run with stand-ins: one rollout, one pass."""

from __future__ import annotations

import dataclasses

import pytest

from fasttr.cli.ocrm import parse_ocrm
from fasttr.cli.train import parse_train
from fasttr.losses.ratios import RELEASE
from fasttr.training.loop import train
from fasttr.training.ocrm import run_ocrm
from tests.places import ROOT
from tests.runs import lines, read_rows, write_rows

RECIPES = ROOT / "fasttr" / "recipes"
TASKS = {"pythia-1b-tldr": (53, 3, 0.05, 192), "qwen2.5-1.5b-alpaca": (106, 10, 0.1, 128)}
STAND_INS = """
    --label tests.killed_online:vowels --use_cpu --bf16 false --rm_bf16 false --dpo_bf16 false
    --train_batch_size 4 --max_completion_length 5 --pairs 12 --stop_ess 0
    --rm_train_batch_size 8 --dpo_train_batch_size 8 --disable_tqdm --rm_disable_tqdm
    --dpo_disable_tqdm --stages 2 --updates_per_stage 1 --num_iterations 1
    --save_strategy no --rm_save_strategy no --dpo_save_strategy no
"""


def words(recipe, *more):
    return ["--config", str(RECIPES / f"{recipe}.yaml"), *more]


@pytest.mark.parametrize("task", TASKS)
def test_an_initial_policy_takes_a_step(task, workspace, tmp_path):
    config = parse_train(words(f"{task}-sft"))
    assert (config.loss_type, config.learning_rate, config.train_batch_size) == ("sft", 3e-6, 128)
    rows = [{"prompt": f"ask {i}", "completion": " an answer"} for i in range(8)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    stand_in = (
        f"--model_name_or_path {workspace / 'model'} --dataset_name {file} --max_steps 1 "
        f"--dataset_train_split train --output_dir {tmp_path / 'run'} --train_batch_size 4 "
        "--use_cpu true --bf16 false --eval_strategy no --save_strategy no --disable_tqdm true"
    )
    train(parse_train(words(f"{task}-sft", *stand_in.split())))
    assert lines(tmp_path / "run")[-1]["train_loss"] > 0


@pytest.mark.parametrize("task", TASKS)
def test_all_arms_run(task, workspace, tmp_path):
    judged = [
        {"prompt": row["prompt"], "response": row["chosen"]}
        for row in read_rows(workspace / "test.jsonl")
    ]
    judge = write_rows(tmp_path / "judge.jsonl", judged)
    places = (
        f"--model_name_or_path {workspace / 'model'} --dataset_name {workspace / 'train.jsonl'} "
        f"--judge_dataset_name {judge} --output_dir {tmp_path / 'run'}"
    ).split()
    config = parse_ocrm(words(f"{task}-ocrm", *places, "--label", "gold"))
    longest, per_prompt, beta, batch = TASKS[task]
    assert (config.rl["max_completion_length"], config.pairs_per_prompt) == (longest, per_prompt)
    assert (config.rl["beta"], config.rm["train_batch_size"]) == (beta, batch)
    assert (config.algorithm, config.stages, config.updates_per_stage) == ("ppo", 3, 195)
    released = parse_ocrm(
        words(f"{task}-ocrm", *places, "--label", "gold", "--ratio_preset", "ocrm-release")
    )
    assert released.ratios == RELEASE
    config = parse_ocrm(words(f"{task}-ocrm", *places, *STAND_INS.split()))
    if task != next(iter(TASKS)):  # the other one differs by its numbers alone
        config = dataclasses.replace(config, arms=["weighted", "ppo-rlhf"])
    results = run_ocrm(config)
    assert {line["arm"] for line in results} == set(config.arms)
    assert all(0 <= line["win_rate"] <= 1 for line in results)
    at_the_end = {line["arm"]: line["episodes"] for line in results if line["stage"] == 2}
    assert {at_the_end[arm] for arm in at_the_end if arm not in ("dpo", "wpo")} == {8}
