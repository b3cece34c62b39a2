"""Where metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. None of them can
stop a run that has
begun: one that fails is told once and left out, since metrics.jsonl holds everything."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fasttr.console import say
from fasttr.errors import FasttrError, one_line

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


@dataclass(frozen=True)
class TrackerConfig:
    """Which trackers take the numbers of a run, and under what name."""

    report_to: str | Sequence[str] = "none"  # a name, a list of names, or none
    run_name: str | None = None  # at wandb and trackio; None lets them choose
    # Theirs too; the environment variables WANDB_PROJECT and TRACKIO_PROJECT win.
    project: str = "huggingface"


class Trackers:
    """All trackers of a run.

    Args:
        config: which ones.
        output_dir: folder of the run; TensorBoard and wandb write into it.
        keep_until: the step a run resumes from; TensorBoard drops later values.
        settings: shown with the run.
    """

    def __init__(
        self,
        config: TrackerConfig,
        output_dir: Path,
        *,
        keep_until: int | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self._open: dict[str, Tracker] = {}
        for name in tracker_names(config.report_to):
            package = _import(name)
            try:
                if name == "tensorboard":
                    self._open[name] = _tensorboard(package, output_dir, keep_until)
                else:
                    self._open[name] = _Online(name, package, output_dir, config, settings or {})
            except Exception as error:  # no account, no network: each package raises its own kinds
                self.close()
                raise FasttrError(
                    f"report_to: {name} could not start: {one_line(error)}; mend that or leave it "
                    "out"
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

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever it is, it is no reason to lose the run
                del self._open[name]
                say(
                    f"WARNING: report_to: {name} failed and is left out from here on "
                    f"({one_line(error)})"
                )


def _tensorboard(package: Any, output_dir: Path, keep_until: int | None) -> Tracker:
    purge_step = None if keep_until is None else keep_until + 1
    return _TensorBoard(package.SummaryWriter(str(output_dir / "runs"), purge_step=purge_step))


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
        output_dir: Path,
        config: TrackerConfig,
        settings: dict[str, Any],
    ):
        self._package = package
        project = os.environ.get(f"{name.upper()}_PROJECT") or config.project
        known = {"project": project, "name": config.run_name, "config": settings}
        if name == "wandb":
            package.init(**known, dir=str(output_dir))
            package.define_metric("train/global_step")
            package.define_metric("*", step_metric="train/global_step", step_sync=True)
        else:
            package.init(**known, resume="allow")

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
