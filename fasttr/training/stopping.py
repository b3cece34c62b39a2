"""What stops a run: a signal, or a loss that is no longer finite."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.errors import FasttrError


class Interrupted(SystemExit):
    """A run that saved and stopped because of a signal; its exit status is 128 + the signal's
    number."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StopRequest:
    """Within, SIGTERM and Ctrl-C are noted instead of acted on; a second one acts as usual."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
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


class FiniteGuard:
    """Reads the flag of a non-finite step one step late, so that the device never waits for the
    host."""

    def __init__(self) -> None:
        self._pending: tuple[int, np.ndarray, Tensor, Any] | None = None

    def raise_flag(self, step: int, rows: np.ndarray, flag: Tensor) -> None:
        """Note the device flag () of `step` (counted from 1): 1 when its loss or gradient was not
        finite."""
        if flag.is_cuda:
            host = torch.empty((), dtype=flag.dtype, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending = (step, rows, host, event)
        else:
            self._pending = (step, rows, flag, None)

    def verify(self, output_dir: Path) -> None:
        """Stop when the last noted step was not finite. Its update was skipped."""
        if self._pending is None:
            return
        step, rows, flag, event = self._pending
        if event is not None:
            event.synchronize()
        self._pending = None
        if float(flag) == 0:
            return
        checkpoints = list_checkpoints(output_dir)
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        good = (
            f"the last good checkpoint is {checkpoints[-1]}"
            if checkpoints
            else "no checkpoint was saved yet"
        )
        raise FasttrError(
            f"step {step}: the loss or its gradient is not finite (rows {shown}); the update was "
            "skipped and the run "
            f"stopped; {good}; lower learning_rate or look at those rows"
        )
