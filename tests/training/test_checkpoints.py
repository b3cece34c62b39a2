"""Which checkpoint a run goes on from, what it leaves of others, and what it may have changed."""

from __future__ import annotations

import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr import Callback, TrainConfig, train
from fasttr.errors import FasttrError
from fasttr.files import FolderLock
from fasttr.training.stopping import Interrupted
from tests.killed import resumable
from tests.runs import (
    assert_same_run,
    checkpoint_names,
    lines,
    read_rows,
    run,
    same_weights,
    settings,
    steps,
    weights,
    write_rows,
)


@pytest.fixture
def copy_of(whole, tmp_path):
    """A copy of an uninterrupted run that a test may go on with."""

    def copied(ref_update: str) -> Path:
        return Path(shutil.copytree(whole[ref_update], tmp_path / "run"))

    return copied


def unfinished(folder: Path, last_step: int) -> Path:
    """The run as it was when it had written checkpoint-LAST_STEP, and no more."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > last_step:
            shutil.rmtree(path)
    (folder / "model.safetensors").unlink()
    kept = [line for line in lines(folder) if line["step"] <= last_step]
    write_rows(folder / "metrics.jsonl", [line for line in kept if "train_runtime" not in line])
    return folder


def go_on(workspace: Path, folder: Path, ref_update: str, **changes):
    values = {"resume_from_checkpoint": True, **changes}
    return run(workspace, folder, **resumable(workspace, ref_update, **values))


class Signals(Callback):
    """Sends SIGTERM to its own process in a step, and counts the saves."""

    def __init__(self, at: int):
        self.at = at
        self.saved: list[str] = []

    def on_step(self, run, metrics):
        if run.step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, run, folder):
        self.saved.append(folder.name)


def signalled(workspace: Path, folder: Path, ref_update: str, at: int, **changes) -> Signals:
    """A run that a signal stops after the step `at`."""
    callback = Signals(at)
    values = settings(workspace, folder, **resumable(workspace, ref_update, **changes))
    with pytest.raises(Interrupted):
        train(TrainConfig(**values), callbacks=[callback])
    return callback


def test_going_on_from_an_older_checkpoint_keeps_what_is_new(workspace, copy_of, whole):
    """The newest one is broken, as its error advises an older one is named, and one is kept."""
    folder = copy_of("soft")
    (folder / "checkpoint-8" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(FasttrError, match=r"checkpoint-8 is incomplete.*use an earlier"):
        go_on(workspace, folder, "soft")
    older = {"resume_from_checkpoint": str(folder / "checkpoint-2"), "save_total_limit": 1}
    callback = signalled(workspace, folder, "soft", at=5, **older)
    assert callback.saved == ["checkpoint-4", "checkpoint-5"]
    assert checkpoint_names(folder) == ["checkpoint-5"]
    assert {path.name for path in folder.glob("superseded-*")} == {
        f"superseded-checkpoint-{step}" for step in (4, 6, 8)
    }
    go_on(workspace, folder, "soft", save_total_limit=1)
    assert_same_run(folder, whole["soft"])


def test_a_signal_at_a_step_that_is_saved_saves_it_once(workspace, tmp_path, whole):
    folder = tmp_path / "run"
    assert signalled(workspace, folder, "hard", at=4).saved == ["checkpoint-2", "checkpoint-4"]
    go_on(workspace, folder, "hard")
    assert_same_run(folder, whole["hard"])


def test_a_limit_holds_when_a_kill_came_before_the_oldest_was_removed(workspace, copy_of):
    folder = unfinished(copy_of("none"), last_step=8)
    assert len(checkpoint_names(folder)) == 4
    go_on(workspace, folder, "none", save_total_limit=2)
    assert checkpoint_names(folder) == ["checkpoint-6", "checkpoint-8"]


def test_a_finished_run_is_left_as_it_is(workspace, copy_of, capsys):
    folder = copy_of("hard")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    result = go_on(workspace, folder, "hard")
    assert result.steps == 8
    assert "nothing to do" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_a_finished_run_whose_log_is_broken_ends_again(workspace, copy_of, whole):
    folder = copy_of("hard")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00")
    go_on(workspace, folder, "hard")
    assert same_weights(folder, whole["hard"])


def test_a_finished_run_can_be_made_longer_and_none_shorter(workspace, copy_of, capsys):
    folder = copy_of("hard")
    result = go_on(workspace, folder, "hard", max_steps=10, logging_steps=1)
    assert "planned for 8 steps and now has 10" in capsys.readouterr().out
    assert result.steps == 10
    assert [line["step"] for line in steps(folder)][-2:] == [9, 10]
    assert checkpoint_names(folder)[-1] == "checkpoint-10"
    with pytest.raises(FasttrError, match=r"max_steps: got 9 steps in all, .* has done 10"):
        go_on(workspace, folder, "hard", max_steps=9)


def test_what_is_computed_may_not_change(workspace, copy_of):
    folder = copy_of("none")
    for changes, expected in (
        ({"beta": 0.2}, r"another configuration \(beta: 0.1 -> 0.2\)"),
        ({"eval_strategy": "no", "ld_alpha": 0.5}, "ld_alpha: None -> 0.5; eval_strategy: 'steps'"),
        ({"dataset_name": str(workspace / "test.jsonl")}, "the rows are not those that"),
    ):
        with pytest.raises(FasttrError, match=expected):
            go_on(workspace, folder, "none", **changes)


def test_logging_steps_may_change_unless_they_say_when_to_evaluate():
    common = {"model_name_or_path": "m", "dataset_name": "d"}
    saved = TrainConfig(**common, eval_strategy="steps", logging_steps=20).as_dict()
    other = TrainConfig(**common, eval_strategy="steps", logging_steps=1)
    assert other.differences(saved) == ["logging_steps: 20 -> 1"]
    apart = {"eval_strategy": "steps", "eval_steps": 5}
    saved = TrainConfig(**common, **apart, logging_steps=20).as_dict()
    assert TrainConfig(**common, **apart, logging_steps=1).differences(saved) == []


def test_model_and_rows_may_have_moved(workspace, copy_of, whole, tmp_path):
    """The rows' fingerprint is what counts, the checkpoint holds the model, and what is kept for a
    backward touches no number."""
    folder = unfinished(copy_of("soft"), last_step=4)
    moved = shutil.copy(workspace / "train.jsonl", tmp_path / "moved.jsonl")
    names = {"model_name_or_path": "/gone/since", "dataset_name": str(moved)}
    go_on(workspace, folder, "soft", **names, gradient_checkpointing=False)
    assert_same_run(folder, whole["soft"])


def test_going_on_elsewhere_is_not_done_over_another_run(workspace, copy_of, whole, tmp_path):
    folder = copy_of("soft")
    before = (folder / "metrics.jsonl").read_bytes()
    of_another = {"resume_from_checkpoint": str(whole["hard"] / "checkpoint-4")}
    with pytest.raises(FasttrError, match=r"already holds checkpoint-8; pass"):
        go_on(workspace, folder, "hard", **of_another)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert len(checkpoint_names(folder)) == 4
    for _ in range(2):  # a scheduler gives the same command again
        go_on(workspace, tmp_path / "new", "hard", **of_another)
        assert same_weights(tmp_path / "new", whole["hard"])


def test_another_model_at_the_same_place_does_not_matter(workspace, copy_of, whole):
    folder = unfinished(copy_of("none"), last_step=4)
    go_on(workspace, folder, "none", model_name_or_path=str(workspace / "reference"))
    assert_same_run(folder, whole["none"])


def test_a_folder_that_holds_a_run_is_not_written_over(workspace, copy_of, whole):
    folder = copy_of("none")
    with pytest.raises(FasttrError, match="already holds checkpoint-8"):
        run(workspace, folder, **resumable(workspace, "none"))
    run(workspace, folder, **resumable(workspace, "none", overwrite_output_dir=True))
    assert_same_run(folder, whole["none"])


@pytest.mark.parametrize("left", ["metrics.jsonl", "model.safetensors"])
def test_a_folder_with_a_log_or_a_model_holds_a_run_too(workspace, whole, tmp_path, left):
    shutil.copy(whole["none"] / left, tmp_path)
    held = {"metrics.jsonl": "metrics.jsonl", "model.safetensors": "a model"}[left]
    with pytest.raises(FasttrError, match=f"already holds {held}; pass"):
        run(workspace, tmp_path)


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model_name_or_path"])
def test_the_starting_models_folder_is_no_output_folder(workspace, key):
    folder = workspace / {"model_name_or_path": "model"}.get(key, "reference")
    with pytest.raises(FasttrError, match=f"is {key} too, and its weights would be replaced"):
        run(workspace, folder, overwrite_output_dir=True, ref_model_name_or_path=str(folder))


@pytest.mark.parametrize(
    "mistake", [{"model_name_or_path": "/nowhere"}, {"dataset_name": "/nowhere.jsonl"}], ids=str
)
def test_overwriting_begins_when_the_run_is_ready(workspace, copy_of, mistake):
    folder = copy_of("none")
    with pytest.raises(FasttrError, match="nowhere"):
        run(workspace, folder, overwrite_output_dir=True, **mistake)
    assert len(checkpoint_names(folder)) == 4


def test_a_second_run_in_one_folder_is_refused_before_it_clears_anything(workspace, tmp_path):
    lock = FolderLock(tmp_path)
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    for resumes in (False, True):
        with pytest.raises(FasttrError, match="another run is writing into"):
            run(workspace, tmp_path, resume_from_checkpoint=resumes)
    assert (tmp_path / ".checkpoint-4.tmp").is_dir()
    lock.release()
    run(workspace, tmp_path, max_steps=1, resume_from_checkpoint=True)
    assert not (tmp_path / ".checkpoint-4.tmp").exists()


def test_weights_have_the_mode_that_the_umask_leaves(whole):
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in whole["soft"].rglob("*")
        if path.is_file()
    }
    assert sum(path.suffix == ".safetensors" for path in modes) == 1 + 4 * 4
    assert set(modes.values()) == {modes[whole["soft"] / "metrics.jsonl"]}


def test_checkpoints_load_in_transformers_as_they_are(whole):
    for folder in (whole["soft"], whole["soft"] / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template
        assert model.config.attention_dropout == 0.0
        ids = tokenizer("alpha beta", return_tensors="pt")
        assert torch.isfinite(model(**ids).logits).all()
    assert weights(whole["soft"]).keys() == weights(whole["soft"] / "checkpoint-4").keys()


def test_rows_that_broke_a_step_are_named_by_their_place_in_the_file(workspace, tmp_path):
    """The first row of every three is dropped, for its sides are the same."""
    rows = read_rows(workspace / "train.jsonl")
    for row in rows[::3]:
        row["rejected"] = row["chosen"]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    values = settings(
        workspace,
        tmp_path / "out",
        dataset_name=str(data),
        train_sampling_strategy="sequential",
    )

    def broken(inputs):
        return inputs.chosen_logp * float("nan")

    with pytest.raises(FasttrError, match=r"step 1: .* \(rows 1, 2, 4, 5 of the data"):
        train(TrainConfig(**values), loss=broken)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_the_last_update_broke_are_not_saved(workspace, tmp_path):
    with pytest.raises(FasttrError, match=r"holds NaN or infinity after the last update"):
        run(workspace, tmp_path, learning_rate=3e38, max_steps=1)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_run_whose_gradients_are_all_0_is_warned_of_once(workspace, tmp_path, capsys):
    """As after a divergence: the loss is that of the first step, and no weight moves."""
    values = settings(workspace, tmp_path, logging_steps=2)
    train(TrainConfig(**values), loss=lambda inputs: 0.693147 + 0 * inputs.chosen_logp)
    said = capsys.readouterr().out
    assert said.count("WARNING: every gradient since the last line of metrics is 0 (step 2)") == 1
    assert said.count("WARNING") == 1
    assert same_weights(tmp_path, workspace / "model")
