"""The best checkpoint: which it is, that it outlives the others, and what if it is gone."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from fasttr import Callback, train
from fasttr.cli import main
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.training.best import Best, Patience
from tests.runs import (
    Asks,
    checkpoint_names,
    error_line,
    evaluations,
    flags,
    run,
    same_weights,
    settings,
    stopped_run,
)


def evaluated_each_step(workspace: Path, **changes) -> dict:
    return {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_dataset_name": str(workspace / "test.jsonl"),
        **changes,
    }


def best_of(values: list[float], *, more_is_better: bool) -> list[int]:
    """The steps at which the best so far was found."""
    best = Best("eval_loss", more_is_better, saves_itself=True)
    return [step for step, x in enumerate(values, 1) if best.note({"eval_loss": x}, step)]


def test_the_first_of_equal_values_is_the_best():
    assert best_of([0.7, 0.9, 0.9, 0.8, 1.1], more_is_better=True) == [1, 2, 5]
    assert best_of([0.7, 0.9, 0.6, 0.6, 0.5], more_is_better=False) == [1, 3, 5]


def test_a_value_that_is_not_a_number_is_never_the_best():
    assert best_of([math.nan, 0.7, math.nan, 0.6], more_is_better=False) == [2, 4]
    assert best_of([math.nan, 0.7, math.nan, 0.6], more_is_better=True) == [2]


def test_a_metric_that_no_evaluation_has_is_one_line():
    best = Best("eval_rewards/gold", True, saves_itself=False)
    found = {"eval_loss": 0.7, "eval_rewards/accuracies_stderr": 0.1}
    with pytest.raises(FasttrError, match=r"eval_rewards/gold is not in this .* of eval_loss$"):
        best.note(found, 3)


def test_what_best_means_follows_from_the_metric():
    common = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_steps": 10}

    def best(**changes) -> Best:
        return Best.of(TrainConfig(model_name_or_path="m", dataset_name="d", **common, **changes))

    assert best() == Best("eval_loss", False, saves_itself=False)
    margins = best(metric_for_best_model="rewards/margins")
    assert margins == Best("eval_rewards/margins", True, saves_itself=False)
    assert best(metric_for_best_model="eval_loss", greater_is_better=True).more_is_better
    assert best(save_strategy="best").saves_itself
    assert Best.of(TrainConfig(model_name_or_path="m", dataset_name="d")) is None


def test_the_best_checkpoint_outlives_the_limit_and_becomes_the_model(workspace, tmp_path, capsys):
    values = settings(
        workspace,
        tmp_path,
        **evaluated_each_step(workspace),
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        greater_is_better=True,
    )
    main(["train", *flags(values)])
    losses = [line["eval_loss"] for line in evaluations(tmp_path)]
    best = losses.index(max(losses)) + 1
    assert best < 3  # the loss falls; were the best among the last, the limit would not be tested
    assert checkpoint_names(tmp_path) == [f"checkpoint-{best}", "checkpoint-4"]
    assert same_weights(tmp_path, tmp_path / f"checkpoint-{best}")
    assert not (tmp_path / "checkpoint-4" / "fasttr").exists()
    assert (tmp_path / "tokenizer.json").is_file()
    assert f"the final model is checkpoint-{best}, the best by eval_loss" in capsys.readouterr().out
    refused = error_line(capsys, ["train", *flags(values), "--resume_from_checkpoint"])
    assert "holds no reference, position or window" in refused


def test_save_strategy_best_saves_what_improves(workspace, tmp_path):
    run(
        workspace,
        tmp_path,
        **evaluated_each_step(workspace, max_steps=3, save_strategy="best"),
        ref_update="hard",
        ref_update_every=2,
        metric_for_best_model="anchor/rewards/margins",
    )
    margins = [line["eval_anchor/rewards/margins"] for line in evaluations(tmp_path)]
    expected = [
        f"checkpoint-{step}"
        for step, margin in enumerate(margins, 1)
        if margin > max(margins[: step - 1], default=float("-inf"))
    ]
    assert checkpoint_names(tmp_path) == expected != []


@pytest.fixture
def half(workspace, tmp_path) -> Path:
    """A run to step 4 of 6 whose best checkpoint is the first, its loss the highest."""
    return stopped_run(workspace, tmp_path / "half", at=4, **best_settings(workspace, max_steps=6))


def best_settings(workspace: Path, **changes) -> dict:
    values = {"load_best_model_at_end": True, "greater_is_better": True, **changes}
    return evaluated_each_step(workspace, **values)


@pytest.mark.parametrize("how", ["another folder", "removed"])
def test_a_best_checkpoint_that_is_gone_is_forgotten_at_the_start(
    workspace, half, tmp_path, capsys, how
):
    folder, resume = half, str(half / "checkpoint-4")
    if how == "another folder":
        folder = tmp_path / "new"
    else:
        shutil.rmtree(half / "checkpoint-1")
    run(
        workspace,
        folder,
        **best_settings(workspace, max_steps=6, resume_from_checkpoint=resume),
    )
    said = capsys.readouterr().out
    assert "checkpoint-1 was the best checkpoint and is gone" in said
    assert "the final model is checkpoint-5" in said
    assert same_weights(folder, folder / "checkpoint-5")


def test_a_best_checkpoint_that_is_there_is_remembered(workspace, half, capsys):
    run(workspace, half, **best_settings(workspace, max_steps=6, resume_from_checkpoint=True))
    assert "the final model is checkpoint-1" in capsys.readouterr().out
    assert same_weights(half, half / "checkpoint-1")


def test_without_any_best_the_last_weights_are_the_model(workspace, tmp_path, capsys):
    run(workspace, tmp_path, **best_settings(workspace, eval_delay=100))
    assert "no checkpoint was called the best" in capsys.readouterr().out
    assert same_weights(tmp_path, tmp_path / "checkpoint-4")


class RemovesTheFirst(Callback):
    """Somebody makes room by hand while the run goes on."""

    def on_save(self, run, folder: Path) -> None:
        if run.step == 3:
            shutil.rmtree(run.output_dir / "checkpoint-1")


def test_a_best_checkpoint_that_goes_in_mid_run_leaves_the_last_weights(
    workspace, tmp_path, capsys
):
    values = settings(workspace, tmp_path, **best_settings(workspace))
    train(TrainConfig(**values), callbacks=[RemovesTheFirst()])
    assert "checkpoint-1 was the best checkpoint and is gone" in capsys.readouterr().out
    assert same_weights(tmp_path, tmp_path / "checkpoint-4")


def test_a_step_that_a_callback_saves_may_be_the_best(workspace, tmp_path):
    """Planned are checkpoints 2 and 4; the evaluations of 1 and 3 count where they are saved."""
    values = settings(workspace, tmp_path, **best_settings(workspace, save_steps=2, eval_steps=1))
    train(TrainConfig(**values), callbacks=[Asks("save", at=1)])
    assert checkpoint_names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert same_weights(tmp_path, tmp_path / "checkpoint-1")


def stopped_at(
    values: list[float], *, patience: int, threshold: float, more_is_better: bool
) -> int:
    """The evaluation (from 1) after which a run ends, 0 for one that goes on."""
    watch = Patience("eval_loss", more_is_better, patience, threshold)
    ends = [watch.is_over({"eval_loss": value}) for value in values]
    return ends.index(True) + 1 if True in ends else 0


@pytest.mark.parametrize("more_is_better", [True, False])
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.0), (2, 0.15), (3, 0.05)])
def test_a_run_ends_where_transformers_would_end_it(more_is_better, patience, threshold, tmp_path):
    from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

    values = [0.5, 0.6, 0.55, 0.62, 0.7, 0.69, 0.71, 0.4, 0.7, 0.3, 0.31, 0.2, 0.2, 0.2]
    theirs = EarlyStoppingCallback(patience, threshold)
    arguments = TrainingArguments(
        str(tmp_path),
        metric_for_best_model="loss",
        greater_is_better=more_is_better,
        use_cpu=True,
        bf16=False,
    )
    state, control = TrainerState(), TrainerControl()
    ended = 0
    for number, value in enumerate(values, 1):
        theirs.on_evaluate(arguments, state, control, {"eval_loss": value})
        # As its Trainer keeps the best, after the callbacks of an evaluation.
        best = state.best_metric
        if best is None or (value > best if more_is_better else value < best):
            state.best_metric = value
        if control.should_training_stop:
            ended = number
            break
    ours = stopped_at(values, patience=patience, threshold=threshold, more_is_better=more_is_better)
    assert ours == ended > 0


def test_a_gain_must_be_larger_than_the_threshold():
    halves = [0.5, 0.25, 0.125]  # exact in binary
    assert stopped_at([0.5] * 3, patience=2, threshold=0.0, more_is_better=False) == 3
    assert stopped_at(halves, patience=1, threshold=0.25, more_is_better=False) == 2
    assert stopped_at(halves, patience=1, threshold=0.24, more_is_better=False) == 3


def test_a_value_that_is_not_a_number_is_no_improvement():
    values = [0.5, math.nan, math.nan, 0.4]
    assert stopped_at(values, patience=2, threshold=0.0, more_is_better=False) == 3


def test_a_run_stops_early_and_says_why(workspace, tmp_path, capsys):
    changes = evaluated_each_step(workspace, learning_rate=0.0, max_steps=6)
    done = run(
        workspace,
        tmp_path,
        early_stopping_patience=2,
        metric_for_best_model="eval_anchor/rewards/accuracies",
        ref_update="hard",
        ref_update_every=2,
        **changes,
    )
    assert done.steps == 3
    said = capsys.readouterr().out
    assert "eval_anchor/rewards/accuracies has not improved on 0 for 2 evaluations" in said


def test_a_resumed_run_goes_on_waiting(workspace, tmp_path):
    changes = evaluated_each_step(workspace, learning_rate=0.0, max_steps=6)
    stopping = {"early_stopping_patience": 3, "metric_for_best_model": "loss"}
    folder = stopped_run(workspace, tmp_path / "run", 2, **changes, **stopping)
    done = run(workspace, folder, resume_from_checkpoint=True, **changes, **stopping)
    assert done.steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_for_best_model": "loss"}, "with eval_strategy no; wanted steps or epoch"),
        ({"eval_strategy": "epoch"}, "without metric_for_best_model; wanted one, such as loss"),
        (
            {"eval_strategy": "epoch", "metric_for_best_model": "loss", "ref_update": "soft"},
            "wanted metric_for_best_model eval_anchor/",
        ),
    ],
)
def test_early_stopping_without_a_metric_that_compares_is_refused(changes, message):
    values = {"model_name_or_path": "m", "dataset_name": "d", "eval_dataset_name": "e", **changes}
    with pytest.raises(FasttrError, match=message):
        TrainConfig(early_stopping_patience=2, **values)
