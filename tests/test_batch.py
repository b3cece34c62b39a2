"""A pack on its way to a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fasttr.batch import RowGather
from fasttr.packing.layout import pack
from tests.tiny import random_trees

CUDA = torch.device("cuda", 0)
STAYS = {"cu_completions", "cu_groups", "cu_rows", "cu_ld_parts", "rows", "num_tokens"}


class HostTensor:
    """A tensor of the host that notes how it is moved."""

    is_cuda = False

    def __init__(self):
        self.is_pinned = False

    def pin_memory(self) -> HostTensor:
        pinned = HostTensor()
        pinned.is_pinned = True
        return pinned

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        return ("moved", device, self.is_pinned, non_blocking)


MOVED = ("moved", CUDA, True, True)


def test_a_pack_moves_through_pinned_memory_without_a_wait_and_its_offsets_stay():
    batch = pack(random_trees([(2, 3, 1)]))
    layout = batch.attention._replace(cu_q=HostTensor(), cu_k=HostTensor(), keys=host_gather())
    on_host = batch._replace(
        attention=layout,
        predicting=host_gather(),
        per_completion={"margin": HostTensor()},
        **{
            name: HostTensor()
            for name in ("input_ids", "position_ids", "target", "token_counts", "weights", "labels")
        },
    )
    moved = on_host.to(CUDA)
    for name in batch._fields:
        value = getattr(moved, name)
        if name in STAYS:
            assert value is getattr(on_host, name), name
        elif name == "attention":
            assert (value.cu_q, value.cu_k) == (MOVED, MOVED)
            assert value.keys == RowGather(MOVED, MOVED, MOVED)
            assert value.on_host is layout.on_host
        elif name == "predicting":
            assert value == RowGather(MOVED, MOVED, MOVED)
        elif name == "per_completion":
            assert value == {"margin": MOVED}
        else:
            assert value == MOVED, name


def host_gather() -> RowGather:
    return RowGather(HostTensor(), HostTensor(), HostTensor())
