"""How everything here is timed: correct first, warm by time, interleaved, medians with their 20th
and 80th percentiles.

Providers take turns within one process, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasttr.environment import environment
from fasttr.metrics.throughput import peak_bytes

Call = Callable[[], Any]


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    calls: int
    turns: tuple[float, ...] = ()  # each call's, in the order in which they were made

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        values = torch.tensor(seconds, dtype=torch.float64)
        points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        p20, median, p80 = torch.quantile(values, points).tolist()
        return cls(median, p20, p80, len(seconds), tuple(seconds))

    def as_dict(self) -> dict[str, float]:
        return {"median_s": self.median, "p20_s": self.p20, "p80_s": self.p80, "calls": self.calls}


def header(command: str) -> dict[str, Any]:
    """What a figure needs beside it: machine, versions, commit, threads, load, and the command."""
    facts = environment()
    return facts | {
        # A copy of the tree without its history has no commit to read: it can be told.
        "git_commit": facts["git_commit"] or os.environ.get("BENCH_COMMIT"),
        "command": command,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        "load_average": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    """A name that folders and lines of results go by: cpu-2-core, nvidia-h200, ..."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{environment()['cpu_count']}-core"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Call, device: torch.device) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    seconds: float = 2.0,
    warm_seconds: float | None = None,
    least: int = 5,
) -> dict[str, Times]:
    """Times of providers that take turns, forwards and backwards, for about `seconds` in all and
    `least` rounds."""
    warm = min(0.3, seconds / 10) if warm_seconds is None else warm_seconds
    for call in calls.values():
        _warm_up(call, device, warm)
    found: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - began < seconds:
        names = list(calls)
        for name in names if rounds % 2 == 0 else reversed(names):
            found[name].append(once(calls[name], device))
        rounds += 1
    return {name: Times.of(times) for name, times in found.items()}


def _warm_up(call: Call, device: torch.device, seconds: float) -> None:
    began = time.perf_counter()
    call()
    synchronize(device)
    while time.perf_counter() - began < seconds:
        call()
        synchronize(device)


def peak_bytes_of(call: Call, device: torch.device) -> int:
    """Most memory that a call holds beyond what was there: the allocator's on CUDA, counted
    allocations on a CPU."""
    if device.type != "cuda":
        return _counted_peak(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _counted_peak(call: Call) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def process_peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: the allocator's on CUDA, resident memory elsewhere.

    The kernel's high-water mark of this address space, because the one of getrusage also remembers
    the parent.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return peak_bytes(device)
    kib = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kib[0] * 1024 if kib else peak_bytes(device)
