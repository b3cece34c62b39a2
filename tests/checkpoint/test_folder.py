"""Checkpoints and final models as folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fasttr import files
from fasttr.checkpoint import folder as folders
from fasttr.errors import FasttrError
from fasttr.models.load import ModelConfig, load_model
from tests.runs import checkpoint_names
from tests.tiny import perturb


@pytest.fixture(scope="module")
def policy(workspace):
    return load_model(ModelConfig(str(workspace / "model")))


@pytest.fixture(scope="module")
def tokenizer(workspace):
    return AutoTokenizer.from_pretrained(workspace / "model")


def made(output_dir: Path, *steps: int) -> None:
    for step in steps:
        folder = folders.folder_of(output_dir, step)
        (folder / "fasttr").mkdir(parents=True)
        (folder / "fasttr" / "state.json").write_text("{}")


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path):
    made(tmp_path, 10, 9, 100)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "superseded-checkpoint-7").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    found = [folder.name for folder in folders.list_checkpoints(tmp_path)]
    assert found == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_the_newest_with_a_state_is_taken_and_what_is_passed_over_is_said(tmp_path, capsys):
    made(tmp_path, 2, 4)
    (tmp_path / "checkpoint-6").mkdir()
    assert folders.newest_with_state(tmp_path).name == "checkpoint-4"
    assert "passing over" in capsys.readouterr().out
    assert folders.newest_with_state(tmp_path / "nowhere") is None


def test_later_checkpoints_than_the_one_gone_on_from_get_another_name(tmp_path, capsys):
    made(tmp_path, 2, 4, 6)
    (tmp_path / "superseded-checkpoint-6").mkdir()
    folders.supersede_after(tmp_path, 2)
    assert checkpoint_names(tmp_path) == ["checkpoint-2"]
    renamed = {path.name for path in tmp_path.glob("superseded-*")}
    assert renamed == {"superseded-checkpoint-4", "superseded-checkpoint-6"}
    assert (tmp_path / "superseded-checkpoint-6" / "fasttr").is_dir()
    assert "checkpoint-6 is later than step 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [2, 4, 6, 8]),
        (1, None, [8]),
        (2, None, [6, 8]),
        (2, 4, [4, 8]),
        (1, 4, [4, 8]),  # the newest is never removed
        (2, 8, [6, 8]),
        (9, 2, [2, 4, 6, 8]),
    ],
    ids=str,
)
def test_the_oldest_beyond_the_limit_go_and_the_best_stays(tmp_path, keep, best, left):
    made(tmp_path, 2, 4, 6, 8)
    best_folder = None if best is None else folders.folder_of(tmp_path, best)
    folders.rotate(tmp_path, keep, best_folder)
    assert checkpoint_names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_a_kill_in_the_middle_of_a_removal_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    made(tmp_path, 2, 4)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folders.rotate(tmp_path, 1)
    monkeypatch.undo()
    assert checkpoint_names(tmp_path) == ["checkpoint-4"]
    files.remove_torn(tmp_path, "checkpoint-*")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_checkpoint_that_will_not_go_stops_no_run(tmp_path, monkeypatch, capsys):
    made(tmp_path, 2, 4)
    monkeypatch.setattr(files.os, "rename", raises(PermissionError(13, "Permission denied")))
    folders.rotate(tmp_path, 1)
    assert checkpoint_names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert "checkpoint-2 cannot be removed and stays" in capsys.readouterr().out


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "model" in path.name}


def sharded(policy, folder: Path) -> Path:
    """The policy's weights in several files, and an index."""
    policy.model.save_pretrained(folder, max_shard_size="40KB")
    assert len(weight_files(folder)) > 2
    return folder


def test_shards_of_an_earlier_final_model_do_not_win_over_the_new_one(policy, tokenizer, tmp_path):
    sharded(policy, tmp_path)
    perturb(policy.model, 0.1)
    folders.save_final(tmp_path, policy, tokenizer)
    assert weight_files(tmp_path) == {"model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, policy.model.lm_head.weight)


def test_a_single_file_of_an_earlier_final_model_does_not_win_over_new_shards(
    policy, tokenizer, tmp_path
):
    folders.save_final(tmp_path, policy, tokenizer)
    perturb(policy.model, 0.1)
    checkpoint = sharded(policy, tmp_path / "checkpoint-2")
    folders.copy_final(checkpoint, tmp_path)
    assert weight_files(tmp_path) == weight_files(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, policy.model.lm_head.weight)
    assert not (tmp_path / ".final.tmp").exists()


def raises(error: Exception):
    def save(*_: object, **__: object) -> None:
        raise error

    return save


FULL = [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=["OSError", "bare Exception"])
def test_a_full_disk_is_one_line_with_the_last_good_checkpoint(
    policy, tokenizer, tmp_path, monkeypatch, error
):
    """A tokenizer's writer raises a bare Exception."""
    made(tmp_path, 2)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", raises(error))
    wanted = "No space left.*last good checkpoint is .*checkpoint-2; free some space and resume"
    with pytest.raises(FasttrError, match=f"checkpoint-4 failed: .*{wanted}"):
        folders.save_checkpoint(tmp_path, 4, policy, tokenizer, None)
    with pytest.raises(FasttrError, match=wanted):
        folders.save_final(tmp_path, policy, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}


def test_another_error_of_writing_asks_for_no_space(policy, tokenizer, tmp_path, monkeypatch):
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", raises(denied))
    with pytest.raises(FasttrError, match=r"Permission denied; no checkpoint was saved yet$"):
        folders.save_checkpoint(tmp_path, 4, policy, tokenizer, None)


def test_a_fault_that_is_not_the_disks_keeps_its_traceback(
    policy, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", raises(KeyError("a fault")))
    with pytest.raises(KeyError, match="a fault"):
        folders.save_checkpoint(tmp_path, 4, policy, tokenizer, None)
    assert list(tmp_path.iterdir()) == []
