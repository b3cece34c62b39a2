"""Speed as a reader can check it: tokens and rows per second of training time, and model FLOP
utilisation."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from fasttr.batch import PackedBatch

# Dense bfloat16 peak of one device, FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_BF16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}


class Speed:
    """Counts what training steps did since the last line of metrics; pauses (evaluation, saving) do
    not count."""

    def __init__(self, model: Any, device: torch.device):
        config = model.config
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        outside = embedding.numel() + (0 if head is embedding else head.numel())
        self._per_token = 6 * (sum(p.numel() for p in model.parameters()) - outside)
        self._per_scored = 6 * head.numel()
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self._per_attended = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim
        self._device = device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = next((peak for key, peak in PEAK_BF16.items() if key in name), None)
        self._tokens = self._rows = self._flops = 0
        self._allocated = 0
        self._since = time.perf_counter()

    def add(self, batch: PackedBatch, rows: int) -> None:
        """One pack went forward and backward. Recomputation never counts."""
        tokens = sum(batch.attention.q_lengths)
        attended = sum(
            q * k - q * (q - 1) // 2
            for q, k in zip(batch.attention.q_lengths, batch.attention.k_lengths, strict=True)
        )
        self._tokens += tokens
        self._allocated += batch.input_ids.numel()
        self._rows += rows
        self._flops += (
            self._per_token * tokens
            + self._per_scored * batch.target.numel()
            + self._per_attended * attended
        )

    def pause(self) -> float:
        return time.perf_counter()

    def resume(self, paused_at: float) -> None:
        self._since += time.perf_counter() - paused_at

    def read(self) -> dict[str, float]:
        """Figures since the last call, under `perf/` and `memory/`. The caller has synchronised the
        device."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        out = {
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/pairs_per_second": self._rows / seconds,
            "perf/padding_fraction": 1 - self._tokens / self._allocated if self._allocated else 0.0,
            "memory/peak_gib": peak_bytes(self._device) / 2**30,
        }
        if self._peak is not None:
            out["perf/mfu"] = self._flops / seconds / self._peak
        self._tokens = self._rows = self._flops = self._allocated = 0
        self._since = time.perf_counter()
        return out


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
