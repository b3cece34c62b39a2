"""What must hold of whole models on this device's own attention before a speed means anything."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.ablation import twin
from bench.gpu.notes import Task
from bench.gpu.small_run import SmallRun
from bench.lengths import make_trees
from bench.shapes import Shape, build
from fasttr.batch import Tree
from fasttr.losses import Sigmoid, group_loss
from fasttr.models.attention import backend_for
from fasttr.models.given import pack_model
from fasttr.models.load import ModelConfig
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import pack

# Heads of 16 numbers: kernels for attention want multiples of 8.
ARCHS = {
    "llama": Shape(400, 128, 2, 8, 2, 256),
    "gpt_neox": Shape(400, 128, 2, 8, 8, 512, arch="gpt_neox"),
}
FLOOR = 2e-4  # nats


def run(task: Task) -> None:
    for name, shape in ARCHS.items():
        trees = make_trees("tiny" if task.dry else "hh", 4 if task.dry else 16, shape.vocabulary)
        model = build(shape, task.device)
        _sharpen(model)
        exact = pack_model(twin(model), _config(task, bf16=False))
        packed = pack_model(twin(model), _config(task, bf16=task.device.type == "cuda"))
        _packed_equals_alone(task, name, packed, exact, trees)
        _starts_at_log_2(task, name, packed, trees)
        _gradients_repeat(task, name, packed, trees)
    _runs_repeat(task)


def _config(task: Task, *, bf16: bool) -> ModelConfig:
    return ModelConfig(name="the gate's model", device=task.device, bf16=bf16)


@torch.no_grad()
def _sharpen(model: torch.nn.Module) -> None:
    """Weights so large that rows differ: as they are drawn, every log-prob is near log V."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            parameter.mul_(4)


def _packed_equals_alone(
    task: Task, name: str, packed: PackedModel, exact: PackedModel, trees: list[Tree]
) -> None:
    """Log-probs in one pack are as near to fp32's as those of completions that run alone."""
    together = packed.logps(pack(trees))
    alone = _alone(packed, trees)
    truth = _alone(exact, trees)
    error_packed = float((together - truth).abs().max())
    error_alone = float((alone - truth).abs().max())
    task.notes.figure(f"{name}: packed, from fp32", error_packed, "nats")
    task.notes.figure(f"{name}: alone, from fp32", error_alone, "nats")
    backend = backend_for(None, task.device, bf16=task.device.type == "cuda")
    task.notes.check(f"{name}: packed = alone", error_packed <= 2 * error_alone + FLOOR, backend)


def _alone(model: PackedModel, trees: list[Tree]) -> Tensor:
    """(N,) each completion in a pack of its own."""
    found = []
    for tree in trees:
        for completion in tree.completions:
            found.append(model.logps(pack([tree._replace(completions=(completion,))])))
    return torch.cat(found)


def _starts_at_log_2(task: Task, name: str, model: PackedModel, trees: list[Tree]) -> None:
    """Where policy and reference are one model, the log-ratio is exactly 0."""
    ref_logp = model.logps(pack(trees))
    loss, logp = _trained(model, trees, ref_logp)
    task.notes.check(f"{name}: log-ratio is exactly 0 at step 0", torch.equal(logp, ref_logp))
    off = abs(float(loss) - math.log(2))
    task.notes.check(f"{name}: first loss is log 2", off < 1e-6, f"off by {off:.1e}")


def _trained(model: PackedModel, trees: list[Tree], ref_logp: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and log-probs of a pack, and gradients."""
    model.zero_grad(set_to_none=True)
    batch = pack(trees).to(model.device)
    loss_fn = group_loss(Sigmoid(0.1), batch.token_counts, batch.weights)
    out = model(batch, loss_fn, ref_logp, normalizer=len(trees), stats=True)
    out.loss.backward()
    return out.loss.detach(), out.logp


def _gradients_repeat(task: Task, name: str, model: PackedModel, trees: list[Tree]) -> None:
    ref_logp = model.logps(pack(trees)) - 0.5
    with _deterministic():
        found = []
        for _ in range(2):
            _trained(model, trees, ref_logp)
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    task.notes.check(f"{name}: gradients repeat bit for bit when asked to", same)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _runs_repeat(task: Task) -> None:
    """Two runs of the trainer under full_determinism end with the same weights."""
    folders = [task.out / f"run-{i}" for i in range(2)]
    for folder in folders:
        SmallRun(task.out, folder, task.device, steps=3).train()
    task.notes.check("runs under full_determinism repeat bit for bit", _same_weights(*folders))


def _same_weights(a: Path, b: Path) -> bool:
    return SmallRun.weights_of(a) == SmallRun.weights_of(b)
