"""Files that are either there whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK = ".lock"


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write a file or a folder to, renamed to `target` at the end.

    What is written reaches the disk before the rename. When the block raises, `target` is as it was
    and nothing is left beside it; a kill can leave the path beside it, which `remove_torn` clears.
    """
    aside = target.with_name(f".{target.name}.tmp")
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        follow_umask(aside)
        sync(aside)
        if aside.is_dir() and target.exists():
            _replace_folder(aside, target)
        else:
            os.replace(aside, target)
    except BaseException:
        _remove(aside)
        raise


def write_text(target: Path, text: str) -> None:
    with written_aside(target) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    write_text(target, json.dumps(value, indent=1) + "\n")


def follow_umask(path: Path) -> None:
    """Give the files of a folder, or a file, the mode that `open` would have given them.

    The writer of safetensors makes files that their owner alone can read.
    """
    mode = 0o666 & ~_umask()
    for file in _files_of(path):
        file.chmod(mode)


class FolderLock:
    """`folder`, made where it is missing, held for this process alone until `release`.

    BlockingIOError when another process holds it. The system lets go of it when that one ends,
    however it ends. A file system that has no locks (some of clusters) lets everybody in.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._was_there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()

    def _locked(self) -> TextIO:
        path = self._folder / LOCK
        while True:
            file = path.open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in NO_LOCKS:
                    return file
                file.close()
                raise
            # Whoever held it before may have taken the file away between these two steps.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()

    def release(self) -> None:
        (self._folder / LOCK).unlink(missing_ok=True)
        self._file.close()
        is_ours = not self._was_there and self._folder.is_dir()
        if is_ours and not any(self._folder.iterdir()):
            self._folder.rmdir()


def remove_folder(folder: Path) -> None:
    """Delete a folder, which is there whole or not at all under its name. OSError when it cannot be
    renamed."""
    aside = folder.with_name(f".{folder.name}.tmp")
    _remove(aside)
    os.rename(folder, aside)
    _remove(aside)


def remove_torn(folder: Path, pattern: str = "*") -> None:
    """Clear what a kill left beside its place; a folder that was being replaced comes back."""
    for old in folder.glob(f".{pattern}.old.tmp"):
        target = folder / old.name.removeprefix(".").removesuffix(".old.tmp")
        if target.exists():
            _remove(old)
        else:
            os.rename(old, target)
    for torn in folder.glob(f".{pattern}.tmp"):
        _remove(torn)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, whatever its type, says that a disk or a quota is full."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    # Writers in Rust raise errors of their own that quote the system's words.
    return any(os.strerror(code) in str(error) for code in NO_SPACE)


def _replace_folder(aside: Path, target: Path) -> None:
    """A folder cannot be renamed onto one that has files in it: the old one steps aside first."""
    replaced = target.with_name(f".{target.name}.old.tmp")
    _remove(replaced)
    os.rename(target, replaced)
    os.rename(aside, target)
    _remove(replaced)


def _files_of(path: Path) -> list[Path]:
    """A file itself, or all files in a folder."""
    if path.is_file():
        return [path]
    return [inner for inner in path.rglob("*") if inner.is_file()]


def _umask() -> int:
    # It can be read only by setting it; another thread's file would be closed rather than open.
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def sync(path: Path) -> None:
    """Let a file, or the files of a folder, reach the disk."""
    for file in _files_of(path):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
