"""Checkpoints: a Hugging Face folder `checkpoint-N` with a folder `fasttr/` beside the weights that
holds everything else a run needs to go on exactly. Written aside and renamed, so that a folder of
that name is always complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttr.errors import FasttrError
from fasttr.models.load import save_model
from fasttr.models.packed import PackedModel

FORMAT = 1
STATE_DIR = "fasttr"
_NAME = re.compile(r"checkpoint-(\d+)")


class RunState(NamedTuple):
    """Everything beside the policy's weights."""

    facts: dict[str, Any]  # JSON: step, updates, window_scored, num_tokens, config, fingerprints
    tensors: dict[str, Tensor]  # scores, metric sums, random state
    optimizer: dict[str, Tensor]  # NAME.exp_avg, NAME.exp_avg_sq, NAME.step
    reference: dict[str, Tensor]  # weights of a soft reference, else empty


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def save_checkpoint(
    output_dir: Path,
    step: int,
    policy: PackedModel,
    tokenizer: Any,
    state: RunState | None,
    keep: int | None,
    best: Path | None = None,
) -> Path:
    """Write `checkpoint-STEP`, then delete the oldest beyond `keep`, which `best` is counted among
    and outlives.

    Without a state it holds the model alone. On failure the earlier ones stand untouched.
    """
    target = folder_of(output_dir, step)
    with _written_aside(target) as folder:
        save_model(policy, tokenizer, folder)
        if state is not None:
            _write_state(folder, state)
    if keep is not None:
        found = list_checkpoints(output_dir)
        kept = found[-keep:]
        if best in found and best not in kept:
            kept = [best, *found[-max(keep - 1, 1) :]]
        for old in found:
            if old not in kept:
                shutil.rmtree(old)
    return target


def _write_state(folder: Path, state: RunState) -> None:
    from safetensors.torch import save_file

    inner = folder / STATE_DIR
    inner.mkdir()
    files = {"state": state.tensors, "optimizer": state.optimizer, "reference": state.reference}
    for name, tensors in files.items():
        if tensors:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                inner / f"{name}.safetensors",
            )
    sizes = {
        str(p.relative_to(folder)): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    facts = {**state.facts, "format": FORMAT, "files": sizes}
    (inner / "state.json").write_text(json.dumps(facts, indent=1) + "\n")


def save_final(output_dir: Path, policy: PackedModel, tokenizer: Any) -> None:
    """The trained model into `output_dir` itself, each file by a rename."""
    with _final(output_dir) as aside:
        save_model(policy, tokenizer, aside)


def copy_final(source: Path, output_dir: Path) -> None:
    """The model of checkpoint `source` into `output_dir` itself, each file by a rename."""
    with _final(output_dir) as aside:
        for path in source.iterdir():
            if path.is_file():
                shutil.copy2(path, aside)


@contextlib.contextmanager
def _final(output_dir: Path) -> Iterator[Path]:
    aside = output_dir / ".final.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    with _one_line_on_full_disk(aside, output_dir):
        aside.mkdir(parents=True)
        yield aside
        for path in sorted(aside.iterdir()):
            os.replace(path, output_dir / path.name)
    aside.rmdir()


def load_state(folder: Path) -> RunState:
    """Read a checkpoint's state; the weights are read by transformers from the same folder."""
    from safetensors.torch import load_file

    path = folder / STATE_DIR / "state.json"
    if not folder.is_dir():
        raise FasttrError(
            f"resume_from_checkpoint: no folder {folder}; give true or a checkpoint-N folder"
        )
    if not path.is_file():
        raise FasttrError(
            f"resume_from_checkpoint: {folder} has no {STATE_DIR}/state.json, so it holds no "
            "reference, position or "
            "window; wanted a folder that fasttr saved"
        )
    try:
        facts = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise FasttrError(
            f"resume_from_checkpoint: {path} is not JSON: {error}; use an earlier checkpoint"
        ) from error
    if facts.get("format") != FORMAT:
        raise FasttrError(
            f"resume_from_checkpoint: {folder} has format {facts.get('format')}; wanted {FORMAT}"
        )
    for name, size in facts["files"].items():
        got = (folder / name).stat().st_size if (folder / name).is_file() else None
        if got != size:
            raise FasttrError(
                f"resume_from_checkpoint: {folder} is incomplete: {name} has {got} bytes, wanted "
                f"{size}; "
                "use an earlier checkpoint"
            )
    parts = {}
    for name in ("state", "optimizer", "reference"):
        file = folder / STATE_DIR / f"{name}.safetensors"
        parts[name] = load_file(file) if file.is_file() else {}
    return RunState(facts, parts["state"], parts["optimizer"], parts["reference"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state under the parameters' names."""
    out = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                out[f"{name}.{key}"] = value
    return out


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = ("exp_avg", "exp_avg_sq", "step")
            optimizer.state[parameter] = {
                key: tensors[f"{name}.{key}"].to(parameter.device) for key in keys
            }


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied weights once."""
    persistent = model.state_dict()
    return {name: value for name, value in model.named_parameters()} | {
        name: value for name, value in model.named_buffers() if name in persistent
    }


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, value in weights(model).items():
        value.copy_(tensors[name])


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with _one_line_on_full_disk(aside, target):
        aside.mkdir(parents=True)
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        replaced = target.with_name(f".{target.name}.old.tmp")
        if target.exists():
            os.rename(target, replaced)
        os.rename(aside, target)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _one_line_on_full_disk(aside: Path, target: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        good = list_checkpoints(aside.parent)
        last = (
            f"the last good checkpoint is {good[-1]}" if good else "there is no earlier checkpoint"
        )
        raise FasttrError(
            f"saving {target} failed: {error}; {last}; free some space and resume from it"
        ) from error


def remove_torn(output_dir: Path) -> None:
    """Folders that a kill in mid-save left behind."""
    for path in [*output_dir.glob(".checkpoint-*.tmp"), output_dir / ".final.tmp"]:
        shutil.rmtree(path, ignore_errors=True)
