"""What a person's own code may do at the joints of a run, without touching its inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fasttr.training.run import Run
from fasttr.training.step import StepMetrics


class Callback:
    """Called by the loop; each method does nothing until a subclass says otherwise.

    With several processes every one of them calls its own; what one asks for, all do.

    `run` shows the objects and counters of the run. `run.ask("stop")`, `run.ask("save")` and
    `run.ask("evaluate")` act after the step in which they are called.
    """

    # An evaluation in the middle of a window needs the reference's log-probs of the evaluation
    # split, which exist at the window's start alone: say True to have them made for every window.
    may_evaluate: bool = False

    def on_train_begin(self, run: Run) -> None:
        """Models and data are read; nothing has been computed."""

    def on_window(self, run: Run, window: range) -> None:
        """The reference's log-probs of the steps in `window` (counted from 0) are there."""

    def on_step(self, run: Run, metrics: StepMetrics) -> None:
        """An optimizer step is done. Only `metrics.read()` waits for the device."""

    def on_evaluate(self, run: Run, metrics: dict[str, float]) -> None:
        """An evaluation is done, before the reference moves where both fall together."""

    def on_move(self, run: Run) -> None:
        """The reference has moved."""

    def on_save(self, run: Run, folder: Path) -> None:
        """A checkpoint is complete in `folder`."""

    def on_train_end(self, run: Run) -> None:
        """The final model is saved."""


class Callbacks(Callback):
    """All callbacks of a run, called in turn."""

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = callbacks
        self.may_evaluate = any(callback.may_evaluate for callback in callbacks)

    def on_train_begin(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.on_train_begin(run)

    def on_window(self, run: Run, window: range) -> None:
        for callback in self.callbacks:
            callback.on_window(run, window)

    def on_step(self, run: Run, metrics: StepMetrics) -> None:
        for callback in self.callbacks:
            callback.on_step(run, metrics)

    def on_evaluate(self, run: Run, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_evaluate(run, metrics)

    def on_move(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.on_move(run)

    def on_save(self, run: Run, folder: Path) -> None:
        for callback in self.callbacks:
            callback.on_save(run, folder)

    def on_train_end(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.on_train_end(run)
