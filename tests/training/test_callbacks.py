"""What a run calls of a person's own code, and what that code may ask of the run."""

from __future__ import annotations

import pytest

from fasttr import Callback, TrainConfig, train
from fasttr.errors import FasttrError
from tests.runs import Asks, checkpoint_names, evaluations, run, settings, steps, timeless


class Diary(Callback):
    """Writes down what it was called for."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, run):
        self.calls.append(("begin", run.step))

    def on_window(self, run, window):
        assert not run.window_logps.lacks(run.plan.rows(window.start))
        self.calls.append(("window", window))

    def on_step(self, run, metrics):
        self.calls.append(("step", run.step))
        assert metrics.read()["loss"] > 0

    def on_evaluate(self, run, metrics):
        self.calls.append(("evaluate", metrics["eval_loss"]))

    def on_move(self, run):
        self.calls.append(("move", run.reference.updates))

    def on_save(self, run, folder):
        assert (folder / "fasttr" / "state.json").is_file()
        self.calls.append(("save", folder.name))

    def on_train_end(self, run):
        self.calls.append(("end", (run.output_dir / "model.safetensors").is_file()))


def test_callbacks_are_called_in_the_order_of_the_loop(workspace, tmp_path):
    diary = Diary()
    second = Diary()
    values = settings(
        workspace,
        tmp_path,
        max_steps=3,
        ref_update="hard",
        ref_update_every=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    train(TrainConfig(**values), callbacks=[diary, second])
    losses = [line["eval_loss"] for line in evaluations(tmp_path)]
    assert diary.calls == [
        ("begin", 0),
        ("window", range(0, 2)),
        ("step", 1),
        ("step", 2),
        ("evaluate", losses[0]),
        ("move", 1),
        ("save", "checkpoint-2"),
        ("window", range(2, 3)),
        ("step", 3),
        ("evaluate", losses[1]),
        ("save", "checkpoint-3"),
        ("end", True),
    ]
    assert second.calls == diary.calls


def test_what_a_callback_asks_for_is_done_after_the_step(workspace, tmp_path):
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    run(workspace, plain)
    values = settings(workspace, asked)
    result = train(TrainConfig(**values), callbacks=[Asks("save", 2), Asks("stop", 4)])
    assert result.steps == 4
    assert checkpoint_names(asked) == ["checkpoint-2"]
    assert list(map(timeless, steps(asked))) == list(map(timeless, steps(plain)[:4]))


def test_a_request_that_does_not_exist_is_refused(workspace, tmp_path):
    values = settings(workspace, tmp_path)
    with pytest.raises(ValueError, match="ask: got 'rest'; wanted one of stop, save, evaluate"):
        train(TrainConfig(**values), callbacks=[Asks("rest", 1)])


@pytest.mark.parametrize("ref_update", ["soft", "hard"])
def test_an_evaluation_that_is_asked_for_is_against_the_windows_reference(
    workspace, tmp_path, ref_update
):
    changes = {
        "ref_update": ref_update,
        "ref_update_every": 4,
        "eval_dataset_name": str(workspace / "test.jsonl"),
    }
    run(workspace, tmp_path / "planned", eval_strategy="steps", eval_steps=3, **changes)
    values = settings(workspace, tmp_path / "asked", eval_strategy="steps", eval_steps=6, **changes)
    train(TrainConfig(**values), callbacks=[Asks("evaluate", 3, may_evaluate=True)])
    planned = evaluations(tmp_path / "planned")[0]
    first, second = evaluations(tmp_path / "asked")
    assert first == planned
    assert (first["step"], second["step"]) == (3, 6)


def test_an_evaluation_in_a_window_that_was_scored_without_it_is_refused(workspace, tmp_path):
    values = settings(
        workspace,
        tmp_path,
        ref_update="hard",
        ref_update_every=4,
        eval_strategy="steps",
        eval_steps=6,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    with pytest.raises(FasttrError, match="may_evaluate"):
        train(TrainConfig(**values), callbacks=[Asks("evaluate", 3)])
