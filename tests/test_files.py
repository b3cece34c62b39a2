"""Files are there whole or not there, have the mode of their folder, and belong to one run."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fasttr import files


@pytest.fixture
def _umask_of_a_group():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("_umask_of_a_group")
def test_what_is_written_has_the_mode_that_the_umask_leaves(tmp_path):
    """The writer of safetensors makes files for their owner alone."""
    tensors = {"x": torch.ones(2)}
    save_file(tensors, tmp_path / "plain.safetensors")
    assert mode_of(tmp_path / "plain.safetensors") == 0o600
    with files.written_aside(tmp_path / "one.safetensors") as aside:
        save_file(tensors, aside)
    with files.written_aside(tmp_path / "folder") as aside:
        (aside / "inner").mkdir(parents=True)
        save_file(tensors, aside / "inner" / "two.safetensors")
    assert mode_of(tmp_path / "one.safetensors") == 0o640
    assert mode_of(tmp_path / "folder" / "inner" / "two.safetensors") == 0o640
    assert os.umask(0o027) == 0o027


def test_a_block_that_raises_leaves_the_target_as_it_was(tmp_path):
    target = tmp_path / "file.json"
    files.write_json(target, {"a": 1})

    def half_written() -> None:
        with files.written_aside(target) as aside:
            aside.write_text("{")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        half_written()
    assert target.read_text() == '{\n "a": 1\n}\n'
    assert names_in(tmp_path) == {"file.json"}


def test_a_folder_replaces_a_folder_whole(tmp_path):
    for content in ("old", "new"):
        with files.written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert names_in(tmp_path / "folder") == {"new"}
    assert names_in(tmp_path) == {"folder"}


@pytest.mark.parametrize("new_one_is_there", [True, False])
def test_a_folder_that_was_being_replaced_comes_back_when_the_new_one_never_came(
    tmp_path, new_one_is_there
):
    """Killed between two renames: the old folder has stepped aside, the new one lies beside."""
    for name in (".checkpoint-4.old.tmp", ".checkpoint-4.tmp", ".other-4.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    if new_one_is_there:
        (tmp_path / "checkpoint-4").mkdir()
        (tmp_path / "checkpoint-4" / "content").write_text("new")
    files.remove_torn(tmp_path, "checkpoint-*")
    assert names_in(tmp_path) == {"checkpoint-4", ".other-4.tmp"}
    found = (tmp_path / "checkpoint-4" / "content").read_text()
    assert found == ("new" if new_one_is_there else ".checkpoint-4.old.tmp")


def test_a_full_disk_is_told_by_its_number_or_by_its_words():
    """Writers in Rust raise errors of their own that quote the system."""
    assert files.is_full_disk(OSError(28, "x"))
    assert files.is_full_disk(Exception("io: No space left on device (os error 28)"))
    assert not files.is_full_disk(PermissionError(13, "Permission denied"))


def test_a_folder_is_locked_for_one(tmp_path):
    folder = tmp_path / "run"
    lock = files.FolderLock(folder)
    with pytest.raises(BlockingIOError):
        files.FolderLock(folder)
    lock.release()
    assert not folder.exists()  # it was made for the lock, and nothing came of it
    again = files.FolderLock(folder)
    (folder / "model").write_text("")
    again.release()
    assert names_in(folder) == {"model"}


def test_a_lock_whose_file_was_taken_away_is_asked_for_anew(tmp_path, monkeypatch):
    """Between opening the file and locking it, the one who held it before removes it."""
    flock = files.fcntl.flock
    calls = []

    def removed_first(file, operation) -> None:
        if not calls:
            (tmp_path / files.LOCK).unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", removed_first)
    lock = files.FolderLock(tmp_path)
    assert len(calls) == 2
    with pytest.raises(BlockingIOError):
        files.FolderLock(tmp_path)
    lock.release()


def test_a_lock_lets_go_of_a_folder_that_is_gone(tmp_path):
    lock = files.FolderLock(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    lock.release()
    assert names_in(tmp_path) == set()


def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    def without_locks(file, operation) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", without_locks)
    first = files.FolderLock(tmp_path)
    second = files.FolderLock(tmp_path)
    first.release()
    second.release()
    assert names_in(tmp_path) == set()
