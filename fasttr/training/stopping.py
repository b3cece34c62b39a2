"""What stops a run: a signal, a callback that asks for it, or a loss that is no longer finite."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.errors import FasttrError


class Interrupted(SystemExit):
    """A run that saved and stopped because of a signal; exits with 128 + the signal's number."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StopSignal:
    """Within, SIGTERM and Ctrl-C are noted instead of acted on; a second one acts as usual."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


class _Flag(NamedTuple):
    step: int  # counted from 1
    rows: np.ndarray
    value: Tensor  # () on the host: 1 when the step was not finite
    copied: Any  # the event after which `value` may be read, or None


class FiniteGuard:
    """Reads the flag of a non-finite step one step late, so that the device never waits."""

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir
        self._pending: _Flag | None = None

    def note(self, step: int, rows: np.ndarray, flag: Tensor) -> None:
        """The device flag () of `step`: 1 when its loss or gradient was not finite.

        `rows`: their places in the data set as it was read.
        """
        copied = None
        if flag.is_cuda:
            on_host = torch.empty((), dtype=flag.dtype, pin_memory=True)
            on_host.copy_(flag, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            flag = on_host
        self._pending = _Flag(step, rows, flag, copied)

    def verify(self) -> None:
        """Stop when the last noted step was not finite. Its update was skipped."""
        if self._pending is None:
            return
        step, rows, flag, copied = self._pending
        self._pending = None
        if copied is not None:
            copied.synchronize()
        if float(flag) == 0:
            return
        raise FasttrError(
            f"step {step}: the loss or its gradient is not finite (rows {_first_of(rows)} of the "
            "data, counted from 0); the update was skipped and the run stopped; "
            f"{_last_good(self._output_dir)}; lower learning_rate or look at those rows"
        )


def check_weights(model: torch.nn.Module, output_dir: Path) -> None:
    """Stop when a weight is not finite: the last update can make it so with a finite gradient."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FasttrError(
                f"{name} holds NaN or infinity after the last update; {_last_good(output_dir)}; "
                "lower learning_rate"
            )


def _first_of(rows: np.ndarray, most: int = 8) -> str:
    shown = ", ".join(map(str, rows[:most]))
    return shown + ", ..." if len(rows) > most else shown


def _last_good(output_dir: Path) -> str:
    found = list_checkpoints(output_dir)
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint was saved yet"
