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

NOT_MEASURED = "not measured on a GPU yet"


class Times(NamedTuple):
    """Seconds of one call."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        t = torch.tensor(sorted(seconds), dtype=torch.float64)
        p20, median, p80 = torch.quantile(
            t, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        ).tolist()
        return cls(median, p20, p80, len(seconds))

    def as_dict(self) -> dict[str, float]:
        return {"median_s": self.median, "p20_s": self.p20, "p80_s": self.p80, "calls": self.calls}


def header(command: str) -> dict[str, Any]:
    """What a figure needs beside it: the machine, versions, commit, threads, load, and the
    command."""
    return environment() | {
        "command": command,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def device_folder(device: torch.device) -> str:
    """The folder under results/ that figures of this device go to: cpu-2-core, nvidia-h200, ..."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{environment()['cpu_count']}-core"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
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
        began = time.perf_counter()
        while True:
            call()
            synchronize(device)
            if time.perf_counter() - began > warm:
                break
    found: dict[str, list[float]] = {name: [] for name in calls}
    began, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - began < seconds:
        order = list(calls) if rounds % 2 == 0 else list(reversed(calls))
        for name in order:
            found[name].append(once(calls[name], device))
        rounds += 1
    return {name: Times.of(times) for name, times in found.items()}


def peak_bytes_of(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory that a call holds beyond what was there: the allocator's on CUDA, counted
    allocations on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    held = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
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
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    from fasttr.metrics.throughput import peak_bytes

    return peak_bytes(device)


def load_of(seconds: float, *, flops: float = 0.0, moved: float = 0.0) -> dict[str, float]:
    """Rates that a time stands for, given the operations and bytes that its author counted."""
    rates = {"tflops": flops / seconds / 1e12} if flops else {}
    return rates | ({"gb_per_s": moved / seconds / 1e9} if moved else {})
