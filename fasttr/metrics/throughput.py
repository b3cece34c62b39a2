"""Speed as a reader can check it: tokens and rows per second of training, and model FLOP use.

Legend: T packed tokens, R predicting rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fasttr.batch import PackedBatch
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.optim.matrices import size_of
from fasttr.packing.tiers import SHARED, model_tokens

# Dense bfloat16 peak of one device, FLOP/s, from NVIDIA's data sheets (without sparsity).
PEAK_BF16 = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}


class FlopCount(NamedTuple):
    """Operations of a forward and a backward, without recomputation: 6 a weight and token, or 4 for
    a frozen weight, which has no gradient of its own."""

    per_token: int  # layers
    per_predicting_row: int  # head
    per_attended_pair: int  # a query with a key

    @classmethod
    def of(cls, model: Any) -> FlopCount:
        config = model.config
        embedding = model.get_input_embeddings().weight
        output = model.get_output_embeddings()
        # A reward model's head is a number a completion.
        head = embedding[:0] if output is None else output.weight
        outside = {id(embedding), id(head)}
        layers = sum(_operations(p) for p in model.parameters() if id(p) not in outside)
        heads = getattr(config, "num_attention_heads", 0)  # a model of states alone has none
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
        # Scores and their sum over values are two products of head_dim, each 2 operations forward
        # and 4 backward.
        attention = 12 * config.num_hidden_layers * heads * head_dim
        return cls(layers, _operations(head), attention)

    def of_pack(self, batch: PackedBatch) -> int:
        queries, keys = batch.attention.lengths()
        # The last of q queries sees k keys, the one before it k - 1, and so on.
        attended = sum(q * k - q * (q - 1) // 2 for q, k in zip(queries, keys, strict=True))
        return (
            self.per_token * len(batch.input_ids)
            + self.per_predicting_row * batch.target.numel()
            + self.per_attended_pair * attended
        )


def _operations(weight: torch.nn.Parameter) -> int:
    return (6 if weight.requires_grad else 4) * size_of(weight)


class Throughput:
    """Counts what training steps did, and how long, since the last line of metrics.

    Args:
        model: a transformers model, whose operations are counted from its sizes.
        device: where it computes.
        peak: FLOP/s that `perf/mfu` is a share of; None: the device's, where it is known.
        clock: seconds of the host, None: its own; on CUDA the device's events are the clock.
        new_event: makes such an event; None: one of torch.cuda.
        tier: how rows share a call of the model; `padded` has padding.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        *,
        peak: float | None = None,
        clock: Callable[[], float] | None = None,
        new_event: Callable[[], Any] | None = None,
        tier: str = SHARED,
    ):
        self._flop_count = FlopCount.of(model)
        self._device = device
        self._tier = tier
        self._peak = peak_flops(device) if peak is None else peak
        self._clock = clock or time.perf_counter
        self._new_event = new_event or functools.partial(torch.cuda.Event, enable_timing=True)
        self._clear()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """What runs within is a training step; nothing else takes time."""
        if self._device.type == "cuda":
            # The host runs ahead of the device: the device's own clock says how long it worked.
            began = self._new_event()
            ended = self._new_event()
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            since = self._clock()
            yield
            self._seconds += self._clock() - since

    def add(self, batch: PackedBatch, rows: int) -> None:
        """One pack went forward and backward."""
        lengths, _ = batch.attention.lengths()
        self._tokens += sum(lengths)
        self._allocated += model_tokens(self._tier, lengths)
        self._rows += rows
        self._flops += self._flop_count.of_pack(batch)

    def read(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Figures since the last call, under `perf/` and `memory/`: those of all ranks, each of
        which calls this. Waits for the device."""
        seconds = max(self._seconds + self._device_seconds(), 1e-9)
        counts = [self._tokens, self._allocated, self._rows, self._flops]
        tokens, allocated, rows, flops = ranks.totals(counts)
        (peak,) = ranks.largest([peak_bytes(self._device)])
        out = {
            "perf/tokens_per_second": tokens / seconds,
            "perf/pairs_per_second": rows / seconds,
            "perf/padding_fraction": 1 - tokens / max(allocated, 1),
            "memory/peak_gib": peak / 2**30,
        }
        if self._peak is not None:
            out["perf/mfu"] = flops / seconds / self._peak / ranks.world
        self._clear()
        return out

    def _device_seconds(self) -> float:
        if not self._events:
            return 0.0
        self._events[-1][1].synchronize()
        return sum(began.elapsed_time(ended) for began, ended in self._events) / 1e3

    def _clear(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []  # at the beginning and the end of a step
        self._tokens = 0
        self._allocated = 0
        self._rows = 0
        self._flops = 0


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a device, FLOP/s, where its data sheet is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16.items() if key in name), None)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
