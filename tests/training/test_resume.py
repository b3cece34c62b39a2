"""Resumed = uninterrupted, bit for bit, wherever the run was cut off."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.errors import FasttrError
from fasttr.training.window import PARTIAL_FILE
from tests.killed import resumable, signalled_run
from tests.runs import assert_same_run, checkpoint_names, run, same_weights, settings


class Ended(NamedTuple):
    """How a child process ended."""

    status: int
    text: str


def signalled(
    workspace: Path,
    folder: Path,
    ref_update: str,
    what: str,
    calls: int,
    signum: int,
    after: Path | None = None,
) -> Ended:
    """Run in a child that gets a signal at a point (see `tests.killed`)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed"])
    output = folder.with_suffix(".txt")
    values = settings(workspace, folder, **resumable(workspace, ref_update))
    process = context.Process(
        target=signalled_run, args=(values, what, calls, signum, output, after)
    )
    process.start()
    process.join(timeout=120)
    return Ended(process.exitcode, output.read_text())


# With saves every 2 steps and windows of 4, step 6 is in the middle of the second window; the 14th
# pack to be scored belongs to the first sweep, after the evaluation split.
@pytest.mark.parametrize(
    ("what", "calls"), [("step", 6), ("score", 14), ("save", 3), ("rename", 3)]
)
@pytest.mark.parametrize("ref_update", ["none", "soft", "hard"])
def test_killed_then_resumed_is_bitwise_the_uninterrupted_run(
    workspace, tmp_path, whole, ref_update, what, calls
):
    folder = tmp_path / "run"
    ended = signalled(workspace, folder, ref_update, what, calls, signal.SIGKILL)
    assert ended.status == -signal.SIGKILL, ended.text
    assert not (folder / "model.safetensors").exists()
    run(workspace, folder, **resumable(workspace, ref_update, resume_from_checkpoint=True))
    assert_same_run(folder, whole[ref_update])
    assert not list(folder.glob(".*tmp"))


@pytest.mark.parametrize("ref_update", ["soft", "hard"])
def test_killed_while_scoring_a_later_window(workspace, tmp_path, whole, ref_update):
    folder = tmp_path / "run"
    after = folder / "checkpoint-4"
    ended = signalled(workspace, folder, ref_update, "score", 2, signal.SIGKILL, after)
    assert ended.status == -signal.SIGKILL, ended.text
    assert list_checkpoints(folder)[-1] == after
    facts = json.loads((after / "fasttr" / "state.json").read_text())
    assert facts["window_scored"] is False
    run(workspace, folder, **resumable(workspace, ref_update, resume_from_checkpoint=True))
    assert_same_run(folder, whole[ref_update])


def test_a_first_sweep_that_was_killed_is_taken_up(workspace, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    ended = signalled(workspace, folder, "none", "score", 14, signal.SIGKILL)
    assert ended.status == -signal.SIGKILL, ended.text
    assert not list_checkpoints(folder)
    assert (folder / PARTIAL_FILE).is_file()
    run(workspace, folder, **resumable(workspace, "none", resume_from_checkpoint=True))
    assert "taking up the reference's log-probs of" in capsys.readouterr().out
    assert_same_run(folder, whole["none"])
    assert not (folder / PARTIAL_FILE).exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_stops_with_its_status(workspace, tmp_path, whole, signum):
    folder = tmp_path / "run"
    ended = signalled(workspace, folder, "hard", "step", 3, signum)
    assert ended.status == 128 + signum, ended.text
    assert "Traceback" not in ended.text
    assert f"saved {folder / 'checkpoint-3'}" in ended.text
    run(workspace, folder, **resumable(workspace, "hard", resume_from_checkpoint=True))
    assert same_weights(folder, whole["hard"])


@pytest.mark.parametrize("fails", ["safetensors.torch.save_file", "os.fsync"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    workspace, tmp_path, whole, monkeypatch, fails
):
    module, name = fails.rsplit(".", 1)
    owner = importlib.import_module(module)
    original = getattr(owner, name)
    folder = tmp_path / "run"

    def full(*args, **kwargs):
        if (folder / "checkpoint-4").exists():
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    wanted = r"No space left on device.*last good checkpoint is .*checkpoint-4"
    with pytest.raises(FasttrError, match=wanted):
        run(workspace, folder, **resumable(workspace, "hard"))
    assert checkpoint_names(folder) == ["checkpoint-2", "checkpoint-4"]
    assert not list(folder.glob(".checkpoint*"))
    monkeypatch.undo()
    run(workspace, folder, **resumable(workspace, "hard", resume_from_checkpoint=True))
    assert_same_run(folder, whole["hard"])


def test_a_copied_run_resumes_from_an_older_folder(workspace, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole["soft"], folder)
    older = str(folder / "checkpoint-2")
    run(workspace, folder, **resumable(workspace, "soft", resume_from_checkpoint=older))
    assert_same_run(folder, whole["soft"])


def test_a_checkpoint_without_a_state_is_passed_over(workspace, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole["soft"], folder)
    (folder / "checkpoint-8" / "fasttr" / "state.json").unlink()
    (folder / "checkpoint-9").write_text("no folder")
    run(workspace, folder, **resumable(workspace, "soft", resume_from_checkpoint=True))
    said = capsys.readouterr().out
    assert "checkpoint-8: it holds no fasttr/state.json" in said
    assert f"resumed from {folder / 'checkpoint-6'} at step 6" in said
    assert_same_run(folder, whole["soft"])
