"""What the machine can do: rates of copies and products, and what is installed on it."""

from __future__ import annotations

import importlib.util
import math
import subprocess
from collections.abc import Callable

import torch
from torch import Tensor

from bench.attention import PROVIDERS, Heads, Inputs
from bench.gpu.notes import Notes, Task
from bench.lengths import trees_filling
from bench.shapes import SHAPES, Shape
from bench.timing import Call, interleaved
from fasttr.environment import attention_backends, head_backends, model_kernels

PEERS = ("trl", "datasets", "jsonargparse", "liger_kernel", "cut_cross_entropy", "quack")
PEERS += ("torchao", "flashoptim", "flash_attn")
SECONDS = 0.15  # of timing for each product


def run(task: Task) -> None:
    _installed(task.notes)
    _clocks(task)
    _copy(task)
    _square_product(task)
    _layer_products(task)
    _head_products(task)
    _grouped_heads(task)


def _installed(notes: Notes) -> None:
    for package in PEERS:
        if importlib.util.find_spec(package) is None:
            notes.lacks(package)
    for backend in (*attention_backends(), *head_backends(), *model_kernels()):
        notes.line["environment"].setdefault("backends", {})[backend.name] = backend.why
    listing = getattr(torch.nn.attention, "list_flash_attention_impls", None)
    found = listing() if listing is not None else "torch has no registry of them"
    notes.check("flash attention implementations are listed", True, str(found))


def _clocks(task: Task) -> None:
    """Read, never set."""
    if task.device.type != "cuda":
        return
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    task.notes.check("nvidia-smi answers", done.returncode == 0, f"{query}: {done.stdout.strip()}")


def _copy(task: Task) -> None:
    count = 1 << 20 if task.dry else 1 << 30
    source = torch.randn(count, device=task.device)
    target = torch.empty_like(source)
    seconds = _median(task, lambda: target.copy_(source))
    task.notes.figure("copy", 2 * 4 * count / seconds / 1e9, "GB/s")


def _square_product(task: Task) -> None:
    size = 128 if task.dry else 8192
    a, b, out = (_drawn(task, size, size) for _ in range(3))
    seconds = _median(task, lambda: torch.mm(a, b, out=out))
    task.notes.figure("product of 8192 cubed", 2 * size**3 / seconds / 1e12, "TFLOP/s")


def _layer_products(task: Task) -> None:
    """The products of a layer of llama-3-8b, each forward, by its input and by its weight."""
    shape, tokens = _shape(task)
    even = _layer_rate(task, shape, tokens)
    odd = _layer_rate(task, shape, tokens - 1)
    task.notes.figure("layer products, T 16384", even, "TFLOP/s")
    task.notes.figure("odd T over even T", odd / even)


def _layer_rate(task: Task, shape: Shape, tokens: int) -> float:
    seconds = 0.0
    for rows, columns in shape.matrices().values():
        x = _drawn(task, tokens, columns)
        weight = _drawn(task, rows, columns)
        y = _drawn(task, tokens, rows)
        products: dict[str, Call] = {
            "forward": lambda x=x, weight=weight, y=y: torch.mm(x, weight.t(), out=y),
            "by input": lambda x=x, weight=weight, y=y: torch.mm(y, weight, out=x),
            "by weight": lambda x=x, weight=weight, y=y: torch.mm(y.t(), x, out=weight),
        }
        times = interleaved(products, task.device, seconds=_seconds(task), warm_seconds=0.0)
        seconds += sum(time.median for time in times.values())
    return 6 * shape.layer_weights * tokens / seconds / 1e12


def _head_products(task: Task) -> None:
    """Logits and the weight's gradient in fp32 from bf16 inputs, as the fused head makes them."""
    from fasttr_kernels import products

    shape, tokens = _shape(task)
    rows = tokens // 4
    hidden = _drawn(task, rows, shape.hidden)
    weight = _drawn(task, shape.vocabulary, shape.hidden)
    logits = torch.empty(rows, shape.vocabulary, device=task.device)
    d_weight = torch.zeros(shape.vocabulary, shape.hidden, device=task.device)
    dz = _drawn(task, rows, shape.vocabulary)
    operations = 2 * rows * shape.head_weights
    calls: dict[str, Callable[[], None]] = {
        "head logits, fp32 out": lambda: products.logits(hidden, weight, logits),
        "head dW, fp32 out": lambda: products.weight_grad(dz, hidden, d_weight, 1.0),
    }
    for what, call in calls.items():
        task.notes.figure(what, operations / _median(task, call) / 1e12, "TFLOP/s")


def _grouped_heads(task: Task) -> None:
    """Whether torch's FlashAttention takes fewer heads of keys than of queries as they are."""
    provider = PROVIDERS["fasttr, varlen"]
    what = "varlen attention takes grouped heads"
    if provider.absent(task.device):
        task.notes.lacks("a GPU, for varlen attention")
        return
    inputs = Inputs.of(
        trees_filling("hh", 2048, 64), Heads(32, 8, 128), task.device, torch.bfloat16
    )
    try:
        out = provider.attend(inputs)
    except (RuntimeError, ValueError, TypeError) as error:
        task.notes.figure(what, 0)
        task.notes.check("the answer to grouped heads is known", True, str(error)[:200])
        return
    expected = PROVIDERS["fasttr, segments"].attend(inputs.in_fp32())
    off = float((out.float() - expected).norm() / expected.norm())
    task.notes.figure(what, float(math.isfinite(off) and off < 2e-2))
    task.notes.check("the answer to grouped heads is known", True, f"off by {off:.1e}")


def _shape(task: Task) -> tuple[Shape, int]:
    """The model and the tokens that products are measured at."""
    return (SHAPES["tiny"], 64) if task.dry else (SHAPES["llama-3-8b"], 16384)


def _drawn(task: Task, rows: int, columns: int) -> Tensor:
    dtype = torch.bfloat16 if task.device.type == "cuda" else torch.float32
    return torch.randn(rows, columns, device=task.device).to(dtype)


def _median(task: Task, call: Call) -> float:
    times = interleaved({"it": call}, task.device, seconds=_seconds(task))
    return times["it"].median


def _seconds(task: Task) -> float:
    return 0.01 if task.dry else SECONDS
