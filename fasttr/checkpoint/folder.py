"""Checkpoints as folders: a Hugging Face folder `checkpoint-N` with a folder `fasttr/` beside the
weights that holds everything else a run needs to go on exactly.

Written aside and renamed, so that a folder of that name is always complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasttr import files
from fasttr.checkpoint.state import STATE_DIR, RunState, write_state
from fasttr.console import say
from fasttr.errors import FasttrError, one_line
from fasttr.models.load import save_model
from fasttr.models.packed import PackedModel

_NAME = re.compile(r"checkpoint-(\d+)")
_SUPERSEDED = "superseded-"
_FINAL = ".final.tmp"
# What a loader would read of an earlier final model: the new one may have other shards.
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
# What tells it whether there is a model or an adapter.
_KIND_FILES = ("config.json", "adapter_config.json")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    steps = {step_of(path): path for path in output_dir.glob("checkpoint-*") if path.is_dir()}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name, or None where the name is no checkpoint's."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def newest_with_state(output_dir: Path) -> Path | None:
    """The newest checkpoint that can be resumed from; what is passed over is said."""
    for folder in reversed(list_checkpoints(output_dir)):
        if (folder / STATE_DIR / "state.json").is_file():
            return folder
        say(f"passing over {folder}: it holds no {STATE_DIR}/state.json to resume from")
    return None


def supersede_after(output_dir: Path, step: int) -> None:
    """Checkpoints beyond the one a run goes on from are not its own: they get another name."""
    for folder in list_checkpoints(output_dir):
        number = step_of(folder)
        if number is not None and number > step:
            renamed = output_dir / f"{_SUPERSEDED}{folder.name}"
            shutil.rmtree(renamed, ignore_errors=True)
            os.rename(folder, renamed)
            say(f"{folder.name} is later than step {step} and is called {renamed.name} from now on")


def save_checkpoint(
    output_dir: Path,
    step: int,
    policy: PackedModel,
    tokenizer: Any,
    state: RunState | None,
) -> Path:
    """Write `checkpoint-STEP`; without a state it holds the model alone.

    On failure the earlier ones stand untouched.
    """
    target = folder_of(output_dir, step)
    with disk_errors(target), aside_for(target) as folder:
        save_model(policy, tokenizer, folder)
        if state is not None:
            write_state(folder, state)
    return target


@contextlib.contextmanager
def aside_for(target: Path) -> Iterator[Path]:
    """A new folder beside a checkpoint's place, which it takes at the end."""
    with files.written_aside(target) as folder:
        folder.mkdir()
        yield folder


def rotate(output_dir: Path, keep: int | None, best: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`; `best` counts among them and outlives them."""
    if keep is None:
        return
    found = list_checkpoints(output_dir)
    kept = found[-keep:]
    if best in found and best not in kept:
        kept = [best, *found[-max(keep - 1, 1) :]]
    for folder in found:
        if folder not in kept:
            _remove_checkpoint(folder)


def remove_checkpoints(output_dir: Path) -> None:
    """Delete all of them."""
    for folder in list_checkpoints(output_dir):
        _remove_checkpoint(folder)


def _remove_checkpoint(folder: Path) -> None:
    """Under its name a folder is whole until it is gone; one that will not go stops no run."""
    try:
        files.remove_folder(folder)
    except OSError as error:
        say(f"WARNING: {folder} cannot be removed and stays: {one_line(error)}")


def save_final(output_dir: Path, policy: PackedModel, tokenizer: Any) -> None:
    """The trained model into `output_dir` itself, each file by a rename."""
    with disk_errors(output_dir), final_for(output_dir) as aside:
        save_model(policy, tokenizer, aside)


def copy_final(source: Path, output_dir: Path) -> None:
    """The model of checkpoint `source` into `output_dir` itself, each file by a rename."""
    with disk_errors(output_dir), final_for(output_dir) as aside:
        for path in source.iterdir():
            if path.is_file():
                shutil.copy2(path, aside)


def holds_final(folder: Path) -> bool:
    """Whether a folder holds a model's weights."""
    return any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern))


def remove_torn_final(output_dir: Path) -> None:
    shutil.rmtree(output_dir / _FINAL, ignore_errors=True)


@contextlib.contextmanager
def final_for(output_dir: Path) -> Iterator[Path]:
    """A new folder whose files take the place of the final model's in `output_dir` at the end."""
    aside = output_dir / _FINAL
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    files.follow_umask(aside)
    files.sync(aside)
    written = {path.name for path in aside.iterdir()}
    for name in sorted(written):
        os.replace(aside / name, output_dir / name)
    for pattern in (*_WEIGHT_FILES, *_KIND_FILES):
        for path in output_dir.glob(pattern):
            if path.name not in written:
                path.unlink()
    aside.rmdir()


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """An error of writing becomes one line that names the last good checkpoint."""
    from safetensors import SafetensorError

    try:
        yield
    except FasttrError:
        raise
    except Exception as error:
        # A tokenizer's writer raises a bare Exception; anything else that is not about the disk
        # is a fault of ours and keeps its traceback.
        if not isinstance(error, OSError | SafetensorError) and not files.is_full_disk(error):
            raise
        shutil.rmtree(target / _FINAL, ignore_errors=True)
        found = list_checkpoints(target.parent if step_of(target) is not None else target)
        last = "no checkpoint was saved yet"
        if found:
            last = f"the last good checkpoint is {found[-1]}"
        remedy = "; free some space and resume from it" if files.is_full_disk(error) else ""
        raise FasttrError(f"saving {target} failed: {one_line(error)}; {last}{remedy}") from error
