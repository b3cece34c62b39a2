"""The weights of a model that computes in bf16, as files hold them.

They are bf16 in the Hugging Face folder, which every engine reads, and the other 16 bits of each
fp32 number lie beside the training state.

In memory the matrices are halves already (their optimizer holds the others); embeddings, norms and
biases are fp32 and become halves on the way out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fasttr_kernels.rounding import join_halves, split_halves
from torch import Tensor

from fasttr.models.packed import PackedModel
from fasttr.models.sharded import Shards
from fasttr.optim.matrices import matrices


@contextlib.contextmanager
def in_bf16(model: Any) -> Iterator[None]:
    """Within, every fp32 parameter of a model is its upper half."""
    own = {p: p.data for p in model.parameters() if p.dtype == torch.float32}
    try:
        for p, whole in own.items():
            p.data, _ = split_halves(whole.contiguous())
        yield
    finally:
        for p, whole in own.items():
            p.data = whole


def as_saved(value: Tensor, bf16: bool) -> Tensor:
    """A copy in the dtype of the folder: the upper half of fp32 where bf16 is computed in."""
    if bf16 and value.dtype == torch.float32:
        return split_halves(value.contiguous())[0]
    return value.clone()


def round_matrices(model: Any) -> None:
    """Of a model that is not trained: its matrices become what a policy's are for the model, bf16
    without the other halves."""
    for p in matrices(model):
        p.data, _ = split_halves(p.data.contiguous())


@torch.no_grad()
def remainders(policy: PackedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The lower halves of the weights by name, int16; empty where the folder holds fp32."""
    if not policy.bf16 or policy.adapter is not None:
        return {}
    found = {}
    for full_name, p in policy.local_parameters().items():
        name = full_name.removeprefix("model.")
        if p.dtype == torch.float32:
            _, found[name] = split_halves(p.detach().contiguous())
        elif "remainder" in optimizer.state[p]:
            found[name] = optimizer.state[p]["remainder"]
    return found


@torch.no_grad()
def add_remainders(model: Any, saved: Mapping[str, Tensor]) -> None:
    """Make fp32 weights that were read from a bf16 folder what they were before it was saved."""
    for name, p in model.named_parameters():
        if name in saved:
            _join(p, saved[name])


@torch.no_grad()
def add_remainders_of_rows(shards: Shards, saved: Mapping[str, Tensor]) -> None:
    """The same for the rows of a divided model that lie here; those of bf16 rows are kept for the
    optimizer."""
    for name, p in shards.parameters.items():
        low = saved.get(name.removeprefix("model."))
        if low is not None and p.dtype == torch.float32:
            _join(p, low)
        elif low is not None:
            shards.remainders[name] = low.to(p.device)


def _join(p: Tensor, low: Tensor) -> None:
    p.copy_(join_halves(p.detach().to(torch.bfloat16), low.to(p.device)))
