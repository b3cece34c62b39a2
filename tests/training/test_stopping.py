"""What ends a run: a step or weights that are not finite, or a signal; and what only warns."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from fasttr.errors import FasttrError
from fasttr.training.stopping import (
    FiniteGuard,
    Interrupted,
    StillnessWatch,
    StopSignal,
    check_weights,
)

FINE, BROKEN = torch.tensor(0.0), torch.tensor(1.0)


def test_a_broken_step_names_itself_its_rows_and_the_last_good_checkpoint(tmp_path):
    guard = FiniteGuard(tmp_path)
    guard.note(6, np.arange(40, 44), FINE)
    guard.verify()
    (tmp_path / "checkpoint-4").mkdir()
    guard.note(7, np.array([198, 3, 12]), BROKEN)
    with pytest.raises(FasttrError, match=r"step 7: .*rows 198, 3, 12 of the data.*checkpoint-4"):
        guard.verify()
    guard.verify()  # it has been said


def test_many_rows_are_not_all_named(tmp_path):
    guard = FiniteGuard(tmp_path)
    guard.note(1, np.arange(20), BROKEN)
    with pytest.raises(FasttrError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. of.*no checkpoint"):
        guard.verify()


class Event:
    """An event of a device that copies only when somebody waits for it."""

    def __init__(self, device: FlagOnDevice):
        self.device = device

    def record(self) -> None:
        self.device.was_recorded = True

    def synchronize(self) -> None:
        self.device.on_host.copy_(self.device.value)


class FlagOnDevice:
    """A flag on a GPU: its copy on the host holds rubbish until the event is waited for."""

    is_cuda = True
    was_recorded = False

    def __init__(self, value: torch.Tensor):
        self.value = value
        self.on_host = 1 - value

    def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
        assert (device, non_blocking) == ("cpu", True)
        return self.on_host


@pytest.mark.parametrize("value", [FINE, BROKEN], ids=["fine", "broken"])
def test_a_flag_on_a_gpu_is_read_after_its_event_alone(tmp_path, value):
    flag = FlagOnDevice(value)
    guard = FiniteGuard(tmp_path, new_event=lambda: Event(flag))
    guard.note(1, np.arange(2), flag)
    assert flag.was_recorded
    if value == 0:
        guard.verify()
    else:
        with pytest.raises(FasttrError, match="step 1"):
            guard.verify()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    model = torch.nn.Linear(3, 2)
    check_weights(dict(model.named_parameters()), tmp_path)
    with torch.no_grad():
        model.bias[1] = value
    with pytest.raises(FasttrError, match=r"^bias holds NaN or infinity after the last update"):
        check_weights(dict(model.named_parameters()), tmp_path)


def test_a_line_without_any_gradient_is_warned_of_once(capsys):
    watch = StillnessWatch()
    for step, norms in enumerate([(0.0, 0.3), (0.0, 0.0), (0.0, 0.0)], 1):
        for norm in norms:
            watch.note(torch.tensor(norm))
        watch.warn(step)
    said = capsys.readouterr().out
    assert said.count("WARNING: every gradient since the last line of metrics is 0") == 1
    assert "(step 2)" in said
    watch.warn(4)  # a line without steps says nothing
    assert capsys.readouterr().out == ""


def test_a_signal_is_noted_once_and_the_second_acts_as_usual():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is before
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_run_exits_with_the_shells_status():
    stopped = Interrupted(signal.SIGTERM)
    assert (stopped.code, stopped.signum) == (143, 15)
    assert isinstance(stopped, SystemExit)
