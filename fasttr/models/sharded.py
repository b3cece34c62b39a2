"""A model whose weights are divided among processes, by FSDP2: each holds some rows of every matrix
and gathers a layer when it computes.

What the optimizer, the reference and checkpoints work on are those rows, as plain tensors in the
same memory (`Shards.parameters`); none of them knows of DTensors. Gradients are summed, never
averaged: a step's loss is divided by its rows.

Norms and biases are small and lie whole in every process, as do the weights of an adapter. They
are fp32, and a group that is gathered together has one dtype.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from fasttr_kernels import PreferenceLoss, linear_preference_loss
from fasttr_kernels.rounding import split_halves
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from fasttr.distributed.ranks import Ranks
from fasttr.models.slices import Source, named, whole
from fasttr.optim.matrices import all_matrices


class Piece(NamedTuple):
    """Which rows of a tensor lie here."""

    start: int
    stop: int
    rows: int  # of the whole tensor

    @classmethod
    def of(cls, rows: int, shard: int, shards: int) -> Piece:
        """FSDP's: as many for each as fill all, but for the last ones."""
        size = -(-rows // shards)
        return cls(min(shard * size, rows), min((shard + 1) * size, rows), rows)


class Layout(NamedTuple):
    """How the weights of a model are kept."""

    halves: bool = False  # matrices are bf16
    keeps_remainders: bool = False  # and what that leaves out is kept for the optimizer
    reshards: bool = True  # layers are let go of after the forward and gathered for the backward


class Shards:
    """What of a model lies here.

    Attributes:
        parameters: by the names of a `PackedModel`: this process's rows of what is divided, and
            what is not, whole.
        pieces: by the same names, which rows those are, of what is divided.
        shapes: of those, whole.
        remainders: the lower halves of bf16 rows, int16, until the optimizer takes them.
    """

    def __init__(self, packed: nn.Module, ranks: Ranks):
        self.ranks = ranks
        self.parameters: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, Piece] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.remainders: dict[str, Tensor] = {}
        self._packed = packed
        self._divided: dict[str, nn.Parameter] = {}

    def settle(self) -> None:
        """Look up where the rows lie. After the first forward, which may move them."""
        self.reshard()
        for name, p in self._packed.named_parameters():
            if not isinstance(p, DTensor):
                self.parameters[name] = p
                continue
            local = p.to_local()
            self._divided[name] = p
            self.parameters[name] = nn.Parameter(local.detach(), requires_grad=p.requires_grad)
            ranks = self.ranks
            self.pieces[name] = Piece.of(p.shape[0], ranks.shard, ranks.shard_size)
            self.shapes[name] = tuple(p.shape)

    def reshard(self) -> None:
        """Let go of gathered weights, which a forward without a backward leaves: they would be read
        again after the rows have changed."""
        for module in self._packed.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def collect_gradients(self) -> None:
        """After a backward: hand the rows' gradients over, added to what is there."""
        for name, p in self._divided.items():
            if p.grad is None:
                continue
            grad = p.grad.to_local()  # type: ignore[attr-defined]
            p.grad = None
            own = self.parameters[name]
            if own.grad is None:
                own.grad = grad
            else:
                own.grad.add_(grad)

    def sum_gradients(self) -> None:
        """Once a step: what layers have not summed over ranks yet."""
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        here = [p for name, p in trained.items() if name not in self.pieces]
        for p in here:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.ranks.sum_([p.grad for p in here if p.grad is not None])
        if self.ranks.world > self.ranks.shard_size:
            for grads in _by_dtype(trained[name].grad for name in self.pieces if name in trained):
                self.ranks.sum_(grads, among="copies")

    def gradient_squares(self) -> Tensor:
        """The sum of squares of the whole model's gradient, () fp64, the same on every rank."""
        divided: list[Tensor] = []
        here: list[Tensor] = []
        for name, p in self.parameters.items():
            if p.grad is not None and p.grad.numel():
                (divided if name in self.pieces else here).append(p.grad)
        total = _squares(divided, self._device)
        self.ranks.sum_([total], among="shards")
        return total + _squares(here, self._device)

    def gathered(self, name: str) -> Tensor:
        """All rows of a parameter. Every rank calls this, in one order."""
        if name not in self._divided:
            return self.parameters[name].detach()
        found: Tensor = self._divided[name].detach().full_tensor()  # type: ignore[attr-defined]
        return found

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


class Opaque:
    """A pack on its way into a divided model: FSDP moves every tensor that it finds in arguments to
    the device, and a pack's offsets belong to the host."""

    def __init__(self, content: Any):
        self.content = content


def divide(
    packed: Any, source: Source, ranks: Ranks, layout: Layout, device: torch.device
) -> Shards:
    """Divide a PackedModel among `ranks`, and read this one's rows from `source` onto `device`.

    `Shards.settle` follows the first forward. Parameters may be empty ones on the device `meta`,
    but for those of an adapter, which keep their values. Every rank calls this. A rank's error of
    reading is one of all.
    """
    model = packed.model
    divided = _names_to_divide(model)
    shards = Shards(packed, ranks)
    values = {}
    with ranks.together():
        for name, p in _unique(model):
            if name in divided:
                piece = Piece.of(p.shape[0], ranks.shard, ranks.shard_size)
                rows = source.rows(name, piece.start, piece.stop)
                values[name] = _stored(rows.to(device), name, p, divided, layout, shards)
            elif ".lora_" not in name:
                values[name] = whole(source, name, p.shape).to(device, torch.float32)
    _empty(model, divided, layout, device, values)
    _fully_shard(packed, ranks, layout)
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for name, p in _unique(model):
        if isinstance(p, DTensor):
            local = DTensor.from_local(
                values.pop(name),
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
            placed[p] = nn.Parameter(local, requires_grad=p.requires_grad)
    _put_in_place(model, placed)
    return shards


def score_through(output: nn.Module, hidden: Tensor, **arguments: Any) -> PreferenceLoss:
    """The fused op on the weight of a head, which is gathered for it where it is divided."""
    fused = getattr(output, _METHOD, None) or functools.partial(_fused, output)
    found: PreferenceLoss = fused(hidden, **arguments)
    return found


_METHOD = "fasttr_head"


def _fused(output: Any, hidden: Tensor, **arguments: Any) -> PreferenceLoss:
    return linear_preference_loss(hidden, output.weight, bias=output.bias, **arguments)


def _unique(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Every parameter under the first of its names, as a list: they are replaced on the way."""
    return list(model.named_parameters())


def _names_to_divide(model: Any) -> dict[str, bool]:
    """Names of what is divided, and whether it is read in bf16: matrices, embeddings and the head,
    but for what is trained beside an adapter."""
    matrices = all_matrices(model)
    has_adapter = any(".lora_" in name for name, _ in named(model))
    tables = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    found = {}
    for name, p in _unique(model):
        is_small = p.ndim < 2 or (has_adapter and p.requires_grad) or ".lora_" in name
        is_table = any(p is table for table in tables)
        if not is_small and (p in matrices or is_table):
            found[name] = p in matrices
    return found


def _stored(
    rows: Tensor,
    name: str,
    p: nn.Parameter,
    divided: Mapping[str, bool],
    layout: Layout,
    shards: Shards,
) -> Tensor:
    if not (layout.halves and divided[name]):
        return rows.to(torch.float32)
    high, low = split_halves(rows.to(torch.float32).contiguous())
    if layout.keeps_remainders and p.requires_grad:
        shards.remainders[f"model.{name}"] = low
    return high


def _empty(
    model: nn.Module,
    divided: Mapping[str, bool],
    layout: Layout,
    device: torch.device,
    values: dict[str, Tensor],
) -> None:
    """Let go of whole values of what is divided; put what is not into its place."""
    replaced = {}
    for name, p in _unique(model):
        if name in divided:
            is_half = layout.halves and divided[name]
            dtype = torch.bfloat16 if is_half else torch.float32
            content = torch.empty(p.shape, dtype=dtype, device="meta")
        else:
            content = values.pop(name) if name in values else p.data.to(device)
        replaced[p] = nn.Parameter(content, requires_grad=p.requires_grad)
    _put_in_place(model, replaced)


def _put_in_place(model: nn.Module, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put parameters in the place of others, in every module that has them."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if p in replaced:
                module.register_parameter(name, replaced[p])


def _fully_shard(packed: Any, ranks: Ranks, layout: Layout) -> None:
    """A group for every decoder layer; for the embedding and the head too, unless they are one."""
    assert ranks.mesh is not None
    model = packed.model
    divided = [p for p in packed.parameters() if p.is_meta]
    shard = functools.partial(
        fully_shard,
        mesh=ranks.mesh["shards"],
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
        ignored_params=set(packed.parameters()).difference(divided),
    )
    for layer in decoder_layers(model):
        shard(layer, reshard_after_forward=layout.reshards)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output.weight is not embedding.weight:
        output.__dict__[_METHOD] = types.MethodType(_fused, output)
        for part in (embedding, output):
            shard(part, reshard_after_forward=True)
            # Neither is read in the backward: the head's gradients are made in the forward.
            part.set_unshard_in_backward(False)
        register_fsdp_forward_method(output, _METHOD)
    shard(packed, reshard_after_forward=False)
    for module in packed.modules():
        if isinstance(module, FSDPModule):
            # Of one group each: these do not reach the groups inside.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("own_logits", "through_layers"):
        register_fsdp_forward_method(packed, method)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers recomputes one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _by_dtype(tensors: Iterable[Tensor | None]) -> list[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        if x is not None:
            found.setdefault(x.dtype, []).append(x)
    return list(found.values())


def _squares(grads: list[Tensor], device: torch.device) -> Tensor:
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    return torch.stack([norm.to(torch.float64) for norm in norms]).square().sum()
