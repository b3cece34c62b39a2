"""Every configuration of the row kernels, timed at real shapes: which one should ship."""

from __future__ import annotations

import os
from typing import Any

import torch

from bench.gpu.notes import Task
from bench.head_problem import LEAVES, make_problem
from bench.head_providers import PROVIDERS, gradients
from bench.shapes import SHAPES

ARCHS = ("llama-3-8b", "pythia-2.8b", "qwen2.5-0.5b")
TOKENS = 4096
SWITCH = "FASTTR_AUTOTUNE"


def run(task: Task) -> None:
    if task.device.type != "cuda":
        task.notes.lacks("a GPU, for kernels to be timed on")
        return
    # Read where the kernels are decorated, which is at their import.
    os.environ[SWITCH] = "1"
    from fasttr_kernels import logits_triton

    leaf = LEAVES["bf16"]
    for arch in ARCHS:
        shape = SHAPES[arch]
        problem = make_problem(
            shape.vocabulary, shape.hidden, TOKENS, device=task.device, leaf=leaf
        )
        gradients(PROVIDERS["fasttr"].prepare(problem), problem)
        for name in ("logp_kernel", "logit_grad_kernel"):
            _note(task, arch, name, getattr(logits_triton, name))
        del problem
        torch.cuda.empty_cache()


def _note(task: Task, arch: str, name: str, kernel: Any) -> None:
    """The time of each configuration of the last search, and which one was chosen."""
    timings: dict[Any, Any] = getattr(kernel, "configs_timings", None) or {}
    task.notes.check(f"{arch}, {name}: configurations were compared", len(timings) > 1)
    for config, milliseconds in timings.items():
        median = milliseconds[0] if isinstance(milliseconds, (list, tuple)) else milliseconds
        task.notes.figure(f"{arch}, {name}, {config}", float(median), "ms")
    if timings:
        task.notes.check(f"{arch}, {name}: the fastest", True, str(kernel.best_config))
