"""An 8B model without its optimizer on one card: forward and backward with full checkpointing, the
forward alone as scoring has it, and what AdamW would add."""

from __future__ import annotations

import torch

from bench.gpu.notes import Task
from bench.lengths import trees_filling
from bench.optim import measure as measure_optimizer
from bench.shapes import SHAPES, build
from bench.timing import Call, interleaved, peak_bytes_of, process_peak_bytes
from fasttr.batch import PackedBatch
from fasttr.losses import Sigmoid, group_loss
from fasttr.metrics.throughput import FlopCount, peak_flops
from fasttr.models.given import pack_model
from fasttr.models.halves import round_matrices
from fasttr.models.load import ModelConfig
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import pack

PACKS = (4096, 8192, 16384)
LENGTHS = ("hh", "ultrafeedback")
SECONDS = 3.0  # of timing for each pack
SHARE_OF_PARAMETERS = 8  # the optimizer is measured on one of so many parts


def run(task: Task) -> None:
    shape = SHAPES["tiny" if task.dry else "llama-3-8b"]
    config = ModelConfig(
        name="the benchmark's model",
        device=task.device,
        bf16=task.device.type == "cuda",
        gradient_checkpointing=True,
        compile=None,
    )
    model = pack_model(build(shape, task.device), config)
    if config.bf16:
        round_matrices(model.model)  # as the trainer's optimizer leaves them
    count = FlopCount.of(model.model)
    packs = (64, 128) if task.dry else PACKS
    for lengths in ("tiny",) if task.dry else LENGTHS:
        for tokens in packs:
            batch = pack(trees_filling(lengths, tokens, shape.vocabulary))
            _pack(task, model, batch, f"{lengths}, packs of {tokens}", count.of_pack(batch))
    del model
    if task.device.type == "cuda":
        torch.cuda.empty_cache()
    _optimizer(task)


def _pack(
    task: Task, model: PackedModel, host_batch: PackedBatch, what: str, operations: int
) -> None:
    batch = host_batch.to(task.device)
    on_gpu = task.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    ref_logp = model.logps(batch)
    loss_fn = group_loss(Sigmoid(0.1), batch.token_counts, batch.weights)

    def both() -> None:
        out = model(batch, loss_fn, ref_logp, normalizer=len(batch.rows), stats=True)
        out.loss.backward()

    calls: dict[str, Call] = {"forward alone": lambda: model.logps(batch), "both": both}
    # The first call makes the gradients, which then stay: the peak holds them.
    both()
    peak = process_peak_bytes(task.device) if on_gpu else peak_bytes_of(both, task.device)
    times = interleaved(
        calls, task.device, seconds=0.05 if task.dry else SECONDS, warm_seconds=0.0, least=3
    )
    seconds = times["both"].median
    task.notes.figure(f"{what}, forward and backward", seconds * 1e3, "ms")
    task.notes.figure(f"{what}, forward alone", times["forward alone"].median * 1e3, "ms")
    task.notes.figure(f"{what}, peak", peak / 2**30, "GiB")
    most = peak_flops(task.device)
    if most is not None:
        task.notes.figure(f"{what}, MFU", operations / seconds / most)
    model.zero_grad(set_to_none=True)


def _optimizer(task: Task) -> None:
    """torch's fused AdamW on a part of the parameters, scaled to all."""
    shape = SHAPES["tiny" if task.dry else "llama-3-8b"]
    layers = max(1, shape.layers // SHARE_OF_PARAMETERS)
    sizes = list(shape.matrices().values()) * layers
    case = measure_optimizer(sizes, ["torch fused"], task.device, 0.05 if task.dry else 2.0)
    row = case["providers"].get("torch fused")
    task.notes.check("torch's AdamW is right", row is not None, str(case["absent"] | case["wrong"]))
    if row is not None:
        scale = shape.parameters / case["parameters"]
        task.notes.figure(
            "torch's fused AdamW, all parameters", row["median_s"] * scale * 1e3, "ms"
        )
