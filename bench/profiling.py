"""What ran on a device, by the profiler: kernels in the kinds that a layer is made of, idle time,
waits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from bench.timing import Call, synchronize

# The first kind with a word in a name is its kind; what matches nothing is elementwise work.
KINDS = {
    "attention": ("flash", "fmha", "attention", "scaled_dot"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "addmm", "bmm", "linear"),
    "gather": ("index", "gather", "scatter"),
    "copies": ("memcpy", "memset", "copy", "fill"),
}
OTHER = "elementwise"
# Operators of a CPU that move nothing by themselves.
VIEWS = {
    *("alias", "as_strided", "chunk", "contiguous", "detach", "expand", "linear", "matmul"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_zeros", "zeros", "zeros_like"),
    *("permute", "reshape", "resolve_conj", "resolve_neg", "result_type", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unsqueeze", "view"),
    "_unsafe_view",
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TOP = 12  # kernels of a table


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    duration: float  # microseconds


class Profile(NamedTuple):
    """Kernels on a GPU; on a CPU operators, each with the time that no other inside it takes."""

    kernels: list[Kernel]
    waits: int  # of the host for the device

    def kinds(self) -> dict[str, dict[str, float]]:
        """Milliseconds and number of the kernels of each kind."""
        out: dict[str, dict[str, float]] = {}
        for kernel in self.kernels:
            row = out.setdefault(kind_of(kernel.name), {"ms": 0.0, "kernels": 0})
            row["ms"] += kernel.duration / 1e3
            row["kernels"] += 1
        return out

    def top(self) -> list[dict[str, Any]]:
        """The kernels that take longest, by name."""
        rows: dict[str, dict[str, Any]] = {}
        for kernel in self.kernels:
            name = kernel.name[:90]
            row = rows.setdefault(name, {"name": name, "ms": 0.0, "calls": 0})
            row["ms"] += kernel.duration / 1e3
            row["calls"] += 1
        return sorted(rows.values(), key=lambda row: -row["ms"])[:TOP]

    def busy_share(self) -> float:
        """Share of the time between the first and the last kernel in which one ran."""
        spans = sorted((k.start, k.start + k.duration) for k in self.kernels)
        if not spans:
            return 0.0
        busy = 0.0
        reached = spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return busy / max(reached - spans[0][0], 1e-9)


def kind_of(name: str) -> str:
    lower = name.lower()
    for kind, words in KINDS.items():
        if any(word in lower for word in words):
            return kind
    return OTHER


def profile_of(call: Call, device: torch.device) -> Profile:
    """One call under torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=activities, acc_events=True) as found:
        call()
        synchronize(device)
    return read_profile(found, device)


def read_profile(found: Any, device: torch.device) -> Profile:
    events = found.events()
    if device.type == "cuda":
        on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [_kernel(event) for event in on_device]
        return Profile(kernels, sum(event.name in WAITS for event in events))
    operators = [event for event in events if event.name.startswith("aten::")]
    moving = [e for e in operators if e.name.removeprefix("aten::") not in VIEWS]
    return Profile([Kernel(e.name, e.time_range.start, e.self_cpu_time_total) for e in moving], 0)


def _kernel(event: Any) -> Kernel:
    span = event.time_range
    return Kernel(event.name, span.start, span.end - span.start)


def shares(kinds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of all time in kernels, by kind."""
    total = sum(row["ms"] for row in kinds.values()) or 1.0
    return {kind: row["ms"] / total for kind, row in kinds.items()}


def kinds_line(kinds: dict[str, dict[str, float]], order: Iterable[str] = (*KINDS, OTHER)) -> str:
    part = shares(kinds)
    return ", ".join(f"{kind} {part[kind]:.0%}" for kind in order if kind in part)
