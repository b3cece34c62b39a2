"""What fasttr runs on: versions, devices, and which back ends are usable here.

`environment()` is the header of every benchmark's JSON; `report()` is what `fasttr env` prints.
Both need torch alone and look up everything else without importing it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fasttr.errors import FasttrError

PACKAGES = (
    "fasttr",
    "torch",
    "triton",
    "transformers",
    "datasets",
    "peft",
    "trl",
    "liger-kernel",
    "flash-attn",
    "numpy",
)
AMPERE = (8, 0)  # below it neither bf16 nor FlashAttention exists


class Usable(NamedTuple):
    """A back end: usable here or not, and the reason with what to do."""

    name: str
    usable: bool
    why: str


def device_for(use_cpu: bool) -> torch.device:
    """Where a model computes: the GPU when there is one, unless the CPU is asked for.

    FasttrError where the kernels cannot run on it.
    """
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    why_not = _no_kernels()
    if why_not is not None:
        raise FasttrError(f"use_cpu: got false, and {why_not}; or pass --use_cpu true")
    return torch.device("cuda")


def environment() -> dict[str, Any]:
    """Versions (None: not installed), git commit of the checkout (None: no checkout), CPU, devices
    with memory in GiB.

    Plain JSON values. Costs milliseconds, and creates no CUDA context beyond asking for device
    properties.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "cpu": _cpu_name(),
        "cpu_count": _cpu_count(),
        "cuda": torch.version.cuda,
        "driver": _driver() if torch.cuda.is_available() else None,
        "devices": _devices(),
    }


def attention_backends() -> list[Usable]:
    """The back ends of packed attention, as `attn_implementation` names them."""
    gpu = _no_gpu()
    varlen = gpu or (
        None
        if is_importable("torch.nn.attention.varlen")
        else f"torch {torch.__version__} has no varlen attention: install torch 2.11 or newer"
    )
    flash = gpu or (
        None
        if version_of("flash-attn")
        else "flash-attn is not installed: pip install 'fasttr[flash]'"
    )
    return [
        _usable("varlen", varlen, "torch.nn.attention.varlen, bf16; the default on CUDA"),
        _usable(
            "flash_attention_2", flash, f"flash-attn {version_of('flash-attn')}, bf16, soft caps"
        ),
        Usable(
            "sdpa",
            True,
            "segment by segment on any device, any dtype"
            + ("; the default here" if varlen else ""),
        ),
    ]


def head_backends() -> list[Usable]:
    """Who works on the logits in the fused head."""
    triton = _no_kernels()
    return [
        _usable("triton rows", triton, "on CUDA"),
        Usable("torch rows", True, "on a CPU" + ("; the default here" if triton else "")),
    ]


def model_kernels() -> list[Usable]:
    """liger-kernel's norm, rotary and MLP kernels (`use_liger_kernel`)."""
    missing = (
        None
        if version_of("liger-kernel")
        else "liger-kernel is not installed: pip install 'fasttr[cuda]'"
    )
    return [
        _usable(
            "liger",
            _no_gpu() or missing,
            f"liger-kernel {version_of('liger-kernel')}; on where layers are not compiled",
        )
    ]


def report() -> str:
    """The text of `fasttr env`."""
    env = environment()
    facts = {
        "python": f"{env['python']} on {env['platform']}",
        **{name: text or "not installed" for name, text in env["versions"].items()},
        "git commit": env["git_commit"] or "not a git checkout",
        "cpu": f"{env['cpu']}, {env['cpu_count']} usable cores",
        "cuda": f"{env['cuda']}, driver {env['driver']}"
        if env["cuda"]
        else "torch was built without CUDA",
    }
    for i, device in enumerate(env["devices"]):
        facts[f"device {i}"] = (
            f"{device['name']}, {device['memory_gib']:.0f} GiB, sm_{device['capability']}"
        )
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {text}" for name, text in facts.items()]
    for title, backends in (
        ("attention (attn_implementation)", attention_backends()),
        ("head", head_backends()),
        ("norm, rotary and MLP kernels (use_liger_kernel)", model_kernels()),
    ):
        lines += ["", title]
        lines += [_row(one) for one in backends]
    return "\n".join(lines)


def _row(one: Usable) -> str:
    start = f"  {'yes' if one.usable else 'no ':<3}  {one.name:<17}  "
    rest = " " * len(start)
    return textwrap.fill(
        one.why, 80, initial_indent=start, subsequent_indent=rest, break_on_hyphens=False
    )


def _usable(name: str, why_not: str | None, what: str) -> Usable:
    return Usable(name, why_not is None, what if why_not is None else why_not)


def _no_gpu() -> str | None:
    """Why no kernel can run on a GPU here, with what to do; None when one can."""
    if torch.version.hip:
        return (
            "this torch is built for ROCm, and the kernels are for CUDA: install torch's CUDA build"
        )
    if not torch.version.cuda:
        built = f"torch {torch.__version__} is built without CUDA"
        return f"{built}: with an NVIDIA GPU, install torch's CUDA build"
    if not torch.cuda.is_available():
        return "no CUDA device is visible: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    capability = torch.cuda.get_device_capability()
    if capability < AMPERE:
        return f"{torch.cuda.get_device_name()} is older than Ampere (sm_80): take a newer one"
    return None


def _no_kernels() -> str | None:
    """Why the kernels of the head, the optimizer and the reference cannot run on a GPU here."""
    # Asked of the module: builds of torch bring it under several names of packages.
    missing = (
        None if is_importable("triton") else "triton is not installed: pip install triton (Linux)"
    )
    return _no_gpu() or missing


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _git_commit() -> str | None:
    """Commit of the checkout that this file is tracked in, with + when tracked files differ from
    it."""
    here = Path(__file__).resolve()
    # An installed package may lie inside somebody else's repository (a .venv in it): its commit is
    # not ours.
    if _run("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _run("git", "-C", str(here.parent), "rev-parse", "HEAD")
    changed = _run("git", "-C", str(here.parent), "status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+" if changed else "")


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _driver() -> str | None:
    answer = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": p.total_memory / 2**30, "capability": f"{p.major}{p.minor}"}
        for p in found
    ]
