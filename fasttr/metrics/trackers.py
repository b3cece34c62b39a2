"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. None of them can
stop a run that has
begun: one that fails is told once and left out, since metrics.jsonl holds everything."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from fasttr.errors import FasttrError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
INSTALL = {"tensorboard": "'fasttr[train]'", "wandb": "wandb", "trackio": "trackio"}


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that `report_to` means: a name, a list, or none. FasttrError on an unknown
    one."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    if names == ["none"]:
        return []
    for name in names:
        if name not in PACKAGES:
            alone = "; none stands alone" if name == "none" else ""
            raise FasttrError(
                f"report_to: got {name!r}; wanted none, or one or more of "
                f"{', '.join(PACKAGES)}{alone}"
            )
    return list(dict.fromkeys(names))


def require_trackers(report_to: str | Sequence[str]) -> None:
    """Raise FasttrError, with what to install, when the package of a tracker is missing."""
    for name in tracker_names(report_to):
        _import(name)


class Tracker(Protocol):
    """Takes the numbers of one line of metrics."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """All trackers of a run.

    Args:
        report_to: a name, a list of names, or none.
        output_dir: folder of the run; TensorBoard and wandb write into it.
        keep_until: the step a run resumes from; TensorBoard drops later values.
        run_name: name of the run at wandb and trackio; none lets them choose.
        project: their project; the environment variables WANDB_PROJECT and TRACKIO_PROJECT win.
        config: settings that are shown with the run.
    """

    def __init__(
        self,
        report_to: str | Sequence[str],
        output_dir: Path,
        *,
        keep_until: int | None = None,
        run_name: str | None = None,
        project: str = "huggingface",
        config: dict[str, Any] | None = None,
    ):
        self._open: dict[str, Tracker] = {}
        for name in tracker_names(report_to):
            package = _import(name)
            try:
                if name == "tensorboard":
                    purge = None if keep_until is None else keep_until + 1
                    self._open[name] = _TensorBoard(
                        package.SummaryWriter(str(output_dir / "runs"), purge_step=purge)
                    )
                else:
                    self._open[name] = _Online(
                        name, package, output_dir, run_name, project, config or {}
                    )
            except (
                Exception
            ) as error:  # no account, no network, a full disk: each package raises its own kinds
                self.close()
                told = " ".join(str(error).split())[:300] or type(error).__name__
                raise FasttrError(
                    f"report_to: {name} could not start: {told}; mend that or leave it out"
                ) from error

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Pass on the numbers among `values`, under `train/` and `eval/`."""
        tagged = {
            (f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"): value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if tagged:
            self._each(lambda tracker: tracker.log(step, tagged))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, act: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever it is, it is no reason to lose the run
                del self._open[name]
                told = " ".join(str(error).split())[:300] or type(error).__name__
                tqdm.write(
                    f"WARNING: report_to: {name} failed and is left out from here on ({told})"
                )


class _TensorBoard:
    def __init__(self, writer: Any):
        self._writer = writer

    def log(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class _Online:
    """wandb and trackio, which share their interface. The axis is train/global_step, as in
    transformers."""

    def __init__(
        self,
        name: str,
        package: Any,
        folder: Path,
        run_name: str | None,
        project: str,
        config: dict[str, Any],
    ):
        self._package = package
        project = os.environ.get(f"{name.upper()}_PROJECT") or project
        if name == "wandb":
            package.init(project=project, name=run_name, config=config, dir=str(folder))
            package.define_metric("train/global_step")
            package.define_metric("*", step_metric="train/global_step", step_sync=True)
        else:
            package.init(project=project, name=run_name, config=config, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._package.log({**values, "train/global_step": step})

    def close(self) -> None:
        self._package.finish()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(PACKAGES[name])
    except ImportError as error:
        raise FasttrError(
            f"report_to: {name} is not installed; run pip install {INSTALL[name]}"
        ) from error
