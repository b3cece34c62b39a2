"""What stops a run: a signal, a callback that asks for it, or a loss that is no longer finite."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.console import say
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

    def __init__(self, output_dir: Path, new_event: Callable[[], Any] = torch.cuda.Event) -> None:
        self._output_dir = output_dir
        self._new_event = new_event
        self._pending: _Flag | None = None

    def note(self, step: int, rows: np.ndarray, flag: Tensor) -> None:
        """The device flag () of `step`: 1 when its loss or gradient was not finite.

        `rows`: their places in the data set as it was read.
        """
        copied = None
        if flag.is_cuda:
            flag = flag.to("cpu", non_blocking=True)  # into pinned memory
            copied = self._new_event()
            copied.record()
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


class StillnessWatch:
    """Warns, once, when no step of a whole line of metrics had a gradient.

    Under hard updates at every step a policy that has diverged shows a loss that looks like that
    of the first step, and nothing else in the line says so.
    """

    def __init__(self) -> None:
        self._largest: Tensor | None = None  # () gradient norm since the last line, on the device
        self._has_warned = False

    def note(self, gradient_norm: Tensor) -> None:
        if self._largest is None:
            self._largest = gradient_norm
        else:
            self._largest = torch.maximum(self._largest, gradient_norm)

    def warn(self, step: int) -> None:
        """At a line of metrics; waits for the device."""
        is_still = self._largest is not None and float(self._largest) == 0
        self._largest = None
        if is_still and not self._has_warned:
            self._has_warned = True
            say(
                f"WARNING: every gradient since the last line of metrics is 0 (step {step}): the "
                "loss no longer depends on the weights, as after a learning_rate that is too high; "
                "look at logps/ and eval_anchor/, which do not restart with the reference"
            )


def check_weights(parameters: Mapping[str, Tensor], output_dir: Path) -> None:
    """Stop when a weight is not finite: the last update can make it so with a finite gradient."""
    for name, parameter in parameters.items():
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
