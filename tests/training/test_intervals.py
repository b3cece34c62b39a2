"""When a run logs, evaluates and saves, which rows it drops, and which checkpoint is the best."""

import re

import numpy as np
import pytest

from fasttr.cli import main
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.packing.plan import Plan
from fasttr.training.intervals import Intervals
from tests.runs import evaluations, same_weights, settings


class Rows:
    """Eleven rows for a plan that is asked for order alone."""

    def __len__(self):
        return 11


def intervals(**changes) -> Intervals:
    config = TrainConfig(model_name_or_path="m", dataset_name="d", train_batch_size=2, **changes)
    plan = Plan(Rows(), train_batch_size=2, num_train_epochs=2.0, max_tokens_per_batch=100)
    return Intervals.of(config, plan)  # 6 steps an epoch, 12 in all


def when(asked) -> list[int]:
    return [step for step in range(1, 13) if asked(step)]


def test_steps_and_shares_and_epochs_are_when_they_say():
    assert when(intervals(logging_steps=5).logs) == [5, 10, 12]
    assert when(intervals(logging_steps=5, logging_first_step=True).logs) == [1, 5, 10, 12]
    assert when(intervals(logging_strategy="epoch").logs) == [6, 12]
    assert when(intervals(logging_strategy="no").logs) == []
    assert when(intervals(logging_steps=0.25).logs) == [3, 6, 9, 12]
    assert when(intervals(save_steps=0.4).saves) == [5, 10, 12]  # ceil(4.8), as TRL
    assert when(intervals(save_strategy="epoch").saves) == [6, 12]
    assert when(intervals(save_strategy="no").saves) == []
    assert when(intervals(eval_strategy="steps", logging_steps=4).evaluates) == [4, 8, 12]
    assert when(intervals(eval_strategy="steps", logging_steps=5).evaluates) == [5, 10, 12]
    assert when(intervals(eval_strategy="steps", eval_steps=4, eval_delay=5).evaluates) == [8, 12]
    assert when(intervals(eval_strategy="epoch", eval_delay=1.5).evaluates) == [12]


def test_the_last_rows_are_dropped_when_they_do_not_fill_a_batch():
    # 11 rows: 10 of them in batches of 2.
    in_pairs = {"train_batch_size": 4, "max_tokens_per_batch": 100}
    plan = Plan(Rows(), **in_pairs, shuffle=False, multiple_of=2)
    assert plan.steps_per_epoch == 3
    assert [plan.rows(step).tolist() for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [0, 1, 2, 3],
    ]
    assert Plan(Rows(), **in_pairs, multiple_of=4).steps_per_epoch == 2
    kept = np.concatenate([plan.rows(step) for step in range(plan.total_steps)])
    assert len(set(kept.tolist())) == 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"load_best_model_at_end": True}, "with eval_strategy no"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch"},
            "wanted that of eval_strategy, or best",
        ),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 4,
                "save_steps": 6,
            },
            "a multiple of 4",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "gold"},
            "metric_for_best_model",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "steps", "ref_update": "soft"},
            "different references do not compare",
        ),
        ({"logging_steps": 0}, "logging_steps: got 0"),
        ({"save_steps": 1.5}, "save_steps: got 1.5; wanted a whole number from 1, or a share"),
        ({"eval_delay": -1}, "eval_delay: got -1"),
    ],
)
def test_contradictions_about_checkpoints_are_refused(changes, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        TrainConfig(model_name_or_path="m", dataset_name="d", **changes)


def test_the_best_checkpoint_outlives_the_limit_and_becomes_the_model(workspace, tmp_path, capsys):
    values = settings(
        workspace,
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        greater_is_better=True,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    main(["train", *(f"--{key}={value}" for key, value in values.items())])
    losses = [line["eval_loss"] for line in evaluations(tmp_path)]
    best = losses.index(max(losses)) + 1
    assert best < 3  # the loss falls; were the best among the last, the limit would not be tested
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert folders == {f"checkpoint-{best}", "checkpoint-4"}
    assert same_weights(tmp_path, tmp_path / f"checkpoint-{best}")
    assert not (tmp_path / "checkpoint-4" / "fasttr").exists()
    assert (tmp_path / "tokenizer.json").is_file()
    assert f"the final model is checkpoint-{best}, the best by eval_loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                *(f"--{key}={value}" for key, value in values.items()),
                "--resume_from_checkpoint",
            ]
        )
    assert "holds no reference, position or window" in capsys.readouterr().err


def test_save_strategy_best_saves_what_improves(workspace, tmp_path):
    values = settings(
        workspace,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        ref_update="hard",
        ref_update_every=2,
        metric_for_best_model="anchor/rewards/margins",
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    main(["train", *(f"--{key}={value}" for key, value in values.items())])
    best, expected = float("-inf"), set()
    for line in evaluations(tmp_path):
        if line["eval_anchor/rewards/margins"] > best:
            best = line["eval_anchor/rewards/margins"]
            expected.add(f"checkpoint-{line['step']}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == expected != set()
