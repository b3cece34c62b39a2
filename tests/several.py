"""Runs on several processes over gloo, forked from a server that has imported everything: a launch
goes through its runs in turn, and one of its ranks may be at fault."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import fasttr.checkpoint.folder
import fasttr.models.packed
import fasttr.training.loop
import fasttr.training.window
from fasttr import Callback, TrainConfig, train
from fasttr.errors import FasttrError
from fasttr.metrics.ledger import PreferenceLedger
from fasttr.models.compiled import compile_layers
from tests.killed import signal_at

PATIENCE = 60  # seconds in which a launch with a fault must have ended
ALL = -1  # in place of a rank


class Fault(NamedTuple):
    """What happens to one rank, or to all of them."""

    rank: int
    kind: str  # signal, nan, error, disk, file, settings
    what: str = "step"  # a point of tests.killed, for a signal
    calls: int = 1
    signum: int = 0

    def named(self) -> str:
        who = "all ranks" if self.rank == ALL else f"rank {self.rank}"
        what = f"signal {self.signum} at {self.what}" if self.kind == "signal" else self.kind
        return f"{who}, {what}, call {self.calls}"


class Ended(NamedTuple):
    """How one rank came out of a launch."""

    status: int | None
    text: str


def launched(
    world: int,
    runs: Sequence[Mapping[str, Any]],
    output: Path,
    fault: Fault | None = None,
    patience: int = PATIENCE,
) -> list[Ended]:
    """Start `world` ranks that train with each of the settings in turn."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed", "tests.several"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(world):
        at = (rank, world, port, patience)
        args = (at, [dict(one) for one in runs], output / f"{rank}.txt", fault)
        processes.append(context.Process(target=_rank, args=args))
        processes[-1].start()
    ends_at = time.monotonic() + (patience if fault is not None else 10 * patience)
    for process in processes:
        process.join(timeout=max(ends_at - time.monotonic(), 0))
    is_hanging = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
        process.join()
    texts = [(output / f"{rank}.txt").read_text() for rank in range(world)]
    assert not any(is_hanging), texts
    return [Ended(p.exitcode, text) for p, text in zip(processes, texts, strict=True)]


def _rank(
    at: tuple[int, int, int, int], runs: list[dict], output: Path, fault: Fault | None
) -> None:
    rank, world, port, patience = at
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115  # lives as long as the process
    sys.stderr = sys.stdout
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=patience))
    if fault is not None and fault.rank in (rank, ALL):
        _prepare(fault)
    try:
        for settings in runs:
            if fault is not None and fault.kind == "settings" and fault.rank == rank:
                settings["beta"] = 0.25
            watch = settings.pop("_watch", None)
            train(TrainConfig(**settings), callbacks=[_WATCHES[watch]()] if watch else [])
    except FasttrError as error:
        print(f"fasttr: error: {error}")
        sys.stdout.flush()
        os._exit(2)
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(int(ended.code or 0))
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    dist.destroy_process_group()


def _prepare(fault: Fault) -> None:
    if fault.kind == "signal":
        signal_at(fault.what, fault.calls, fault.signum, None)
    else:
        _FAULTS[fault.kind](fault)


def _at_call(
    owner: Any,
    name: str,
    calls: int,
    act: Callable[[Any], Any],
    counts: Callable[..., bool] = lambda *args, **kwargs: True,
) -> None:
    """What the `calls`-th call of a function returns goes through `act`; only calls that `counts`
    says count."""
    original = getattr(owner, name)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += counts(*args, **kwargs)
        found = original(*args, **kwargs)
        return act(found) if count == calls and counts(*args, **kwargs) else found

    setattr(owner, name, counted)


def _raise(error: Exception) -> Callable[[Any], Any]:
    def act(_: Any) -> Any:
        raise error

    return act


def _nan(fault: Fault) -> None:
    broken = lambda sums: sums * float("nan")  # noqa: E731
    _at_call(PreferenceLedger, "of_pack", fault.calls, broken, _is_of_a_step)


def _is_of_a_step(*args: Any, **kwargs: Any) -> bool:
    """A step tells packs of micro-batches apart; an evaluation, which may be NaN, does not."""
    return len(args) > 4


def _error(fault: Fault) -> None:
    error = RuntimeError("something is wrong with one rank")
    _at_call(PreferenceLedger, "of_pack", fault.calls, _raise(error))


def _disk(fault: Fault) -> None:
    error = OSError(28, "No space left on device")
    _at_call(fasttr.checkpoint.folder, "save_model", fault.calls, _raise(error))


def _file(fault: Fault) -> None:
    """The disk of one of the ranks that write a divided model."""
    error = OSError(28, "No space left on device")
    _at_call(safetensors.torch, "save_file", fault.calls, _raise(error))


def _nothing(fault: Fault) -> None:
    """The settings are what differs."""


class _Counts(Callback):
    """What a run sends at its end: for a move of the reference, for lending its weights, for
    scoring a pack and for a pack of a step."""

    def on_train_end(self, run: Any) -> None:
        pack = run.packs(0)[0]
        found = {
            "move": _sent_by(run.reference.move),
            "exchange": _sent_by(lambda: _lend(run)),
            "score": _sent_by(lambda: run.policy.logps(pack)),
        }
        run.policy.reshard()
        found["step"] = _sent_by(
            lambda: run.policy(pack, lambda logp, *_: logp.sum()).loss.backward()
        )
        if run.ranks.is_first:
            (run.output_dir / "counts.json").write_text(json.dumps(found))


class _Compiles(Callback):
    """Compiles the layers of the run, without a code generator."""

    def on_train_begin(self, run: Any) -> None:
        assert compile_layers(run.policy, True, "aot_eager")


_WATCHES: dict[str, type[Callback]] = {"counts": _Counts, "compiles": _Compiles}


def _lend(run: Any) -> None:
    with run.reference.model():
        pass


def _sent_by(act: Callable[[], Any]) -> dict[str, int]:
    """How often each kind of collective was called."""
    with warnings.catch_warnings(), CommDebugMode() as mode:
        warnings.simplefilter("ignore")  # of the mode's own hooks
        act()
    found: dict[str, int] = {}
    for op, count in mode.get_comm_counts().items():
        name = str(op).rpartition(".")[2].strip("_").replace("_base", "")
        found[name] = found.get(name, 0) + count
    return found


_FAULTS: dict[str, Callable[[Fault], None]] = {
    "nan": _nan,
    "error": _error,
    "disk": _disk,
    "file": _file,
    "settings": _nothing,
}
