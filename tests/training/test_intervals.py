"""When a run logs, evaluates and saves, and which settings about it contradict each other."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from fasttr.config.train_config import TrainConfig
from fasttr.data.in_memory import ListTrees
from fasttr.errors import FasttrError
from fasttr.packing.plan import Plan
from fasttr.training.intervals import Intervals
from tests.tiny import random_trees

STEPS = {"eval_strategy": "steps"}
EPOCH = {"eval_strategy": "epoch"}


def intervals(**changes) -> Intervals:
    """Of a run of 11 rows, 2 a step: 6 steps an epoch, 12 in all."""
    config = TrainConfig(model_name_or_path="m", dataset_name="d", train_batch_size=2, **changes)
    trees = ListTrees(random_trees([(1, 1, 1)] * 11))
    plan = Plan(trees, train_batch_size=2, num_train_epochs=2.0, max_tokens_per_batch=100)
    return Intervals.of(config, plan)


def when(asked: Callable[[int], bool]) -> list[int]:
    return [step for step in range(1, 13) if asked(step)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"logging_steps": 5}, [5, 10, 12]),
        ({"logging_steps": 5, "logging_first_step": True}, [1, 5, 10, 12]),
        ({"logging_strategy": "epoch"}, [6, 12]),
        ({"logging_strategy": "no"}, []),
        ({"logging_steps": 0.25}, [3, 6, 9, 12]),
    ],
    ids=str,
)
def test_lines_are_written_when_the_settings_say(changes, expected):
    assert when(intervals(**changes).logs) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_steps": 0.4}, [5, 10, 12]),  # ceil(4.8), as TRL
        ({"save_strategy": "epoch"}, [6, 12]),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "best", **STEPS}, []),
    ],
    ids=str,
)
def test_checkpoints_are_saved_when_the_settings_say(changes, expected):
    assert when(intervals(**changes).saves) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({**STEPS, "logging_steps": 4}, [4, 8, 12]),
        ({**STEPS, "logging_steps": 5}, [5, 10, 12]),
        ({**STEPS, "eval_steps": 4, "eval_delay": 5}, [8, 12]),
        ({**STEPS, "eval_steps": 4, "eval_delay": 8}, [8, 12]),  # its own step too, as TRL
        ({**STEPS, "eval_steps": 4, "eval_delay": 9}, [12]),
        ({**EPOCH, "eval_delay": 1.5}, [12]),
        ({**EPOCH, "eval_delay": 1}, [6, 12]),
        ({}, []),
    ],
    ids=str,
)
def test_evaluations_come_when_the_settings_say(changes, expected):
    assert when(intervals(**changes).evaluates) == expected


BEST = {"load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (BEST, "with eval_strategy no"),
        ({**BEST, **EPOCH}, "wanted that of eval_strategy, or best"),
        ({**BEST, **STEPS, "eval_steps": 4, "save_steps": 6}, "a multiple of 4"),
        ({**BEST, **STEPS, "eval_steps": 0.25, "save_steps": 2}, "a multiple of 0.25"),
        (
            {"save_strategy": "best", **STEPS, "metric_for_best_model": "gold"},
            "metric_for_best_model",
        ),
        (
            {"save_strategy": "best", **STEPS, "ref_update": "soft"},
            "different references do not compare",
        ),
        ({"logging_steps": 0}, "logging_steps: got 0"),
        ({"save_steps": 1.5}, "save_steps: got 1.5; wanted a whole number from 1, or a share"),
        ({"eval_delay": -1}, "eval_delay: got -1"),
    ],
    ids=str,
)
def test_contradictions_about_checkpoints_are_refused(changes, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        TrainConfig(model_name_or_path="m", dataset_name="d", **changes)


def test_settings_of_the_best_checkpoint_that_fit_are_taken():
    anchored = {"ref_update": "soft", "metric_for_best_model": "anchor/rewards/accuracies"}
    for fits in (
        {**BEST, **STEPS, "eval_steps": 4, "save_steps": 8},
        {**BEST, **EPOCH, "save_strategy": "epoch"},
        {**BEST, **STEPS, "eval_steps": 3, "save_strategy": "best"},
        {"save_strategy": "best", **STEPS, **anchored},
    ):
        TrainConfig(model_name_or_path="m", dataset_name="d", **fits)
