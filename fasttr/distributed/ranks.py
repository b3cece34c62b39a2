"""The processes of a run: who they are, and the few things that they tell each other.

Every rank knows the whole plan, so that little is said: sums of gradients and metrics once a step,
log-probs once a window, and whether a signal, a request or an error came to one of them. Whatever
one rank alone sees must be agreed on here before it decides anything: a rank that acts on its own
clock, signal or exception leaves the others waiting for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fasttr.errors import FasttrError, one_line

T = TypeVar("T")

BUCKET = 2**26  # values that travel in one sum
UNKNOWN = np.iinfo(np.int32).min  # below the bits of every number that is not negative zero


@dataclass(frozen=True)
class Ranks:
    """One process of a run among `world`; alone, nothing is sent and every call is free."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # among those of its machine
    shard_size: int = 1  # neighbours in rank that hold one copy of the weights together
    mesh: DeviceMesh | None = None  # (copies, shards), where the weights are divided

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and lines for all."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are divided, so that ranks meet in every layer."""
        return self.shard_size > 1

    @property
    def shard(self) -> int:
        """The number of this rank among those that hold one copy together."""
        return self.rank % self.shard_size

    @property
    def is_first_copy(self) -> bool:
        """Whether it is one of those that write the weights."""
        return self.rank < self.shard_size

    def sharded(self, shard_size: int, on_gpu: bool) -> Ranks:
        """These ranks with weights that are divided among so many neighbours; 0 means all of them.

        Every rank calls this. FasttrError where they do not make whole copies.
        """
        size = shard_size or self.world
        if size > self.world or self.world % size:
            raise FasttrError(
                f"shard_size: got {size} with {self.world} processes; wanted a number that "
                "divides theirs, or 0 for all of them"
            )
        if size == 1:
            return self
        mesh = init_device_mesh(
            "cuda" if on_gpu else "cpu",
            (self.world // size, size),
            mesh_dim_names=("copies", "shards"),
        )
        return dataclasses.replace(self, shard_size=size, mesh=mesh)

    def sum_(self, tensors: Sequence[Tensor], among: str = "all") -> None:
        """Add up tensors of one dtype over all ranks, in place, in few messages.

        `among`: `shards` sums over the ranks of one copy, `copies` over those that hold the same
        shard of every copy.
        """
        if self.world == 1:
            return
        group = None
        if among != "all":
            assert self.mesh is not None
            group = self.mesh.get_group(among)
        for bucket in _buckets(tensors):
            flat = torch.cat([x.reshape(-1) for x in bucket])
            _wait_for_all(functools.partial(dist.all_reduce, flat, group=group))
            parts = flat.split([x.numel() for x in bucket])
            for x, part in zip(bucket, parts, strict=True):
                x.copy_(part.view_as(x))

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks; on the host, so that no device is waited
        for."""
        if self.world == 1:
            return list(numbers)
        on_host = torch.tensor(numbers, dtype=torch.int64)
        _wait_for_all(lambda: dist.all_reduce(on_host, op=dist.ReduceOp.MAX))
        return on_host.tolist()

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks, on the host."""
        if self.world == 1:
            return list(numbers)
        on_host = torch.tensor(numbers, dtype=torch.float64)
        _wait_for_all(lambda: dist.all_reduce(on_host))
        return on_host.tolist()

    def merge_(self, values: np.ndarray) -> None:
        """Make an array of float32, NaN where this rank knows nothing, the same on all of them.

        Exact: bits travel, not numbers. Where several ranks know one, they agree on one of theirs.
        """
        if self.world == 1:
            return
        known = ~np.isnan(values)
        # +0 so that a negative zero, whose bits mean "unknown", is not among them.
        bits = np.where(known, (values + np.float32(0)).view(np.int32), UNKNOWN)
        merged = torch.from_numpy(np.ascontiguousarray(bits))
        _wait_for_all(lambda: dist.all_reduce(merged, op=dist.ReduceOp.MAX))
        found = merged.numpy()
        values[:] = np.where(found == UNKNOWN, np.float32("nan"), found.view(np.float32))

    def gathered(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        _wait_for_all(lambda: dist.all_gather_object(found, value))
        return found

    def same(self, what: str, value: Any) -> None:
        """Raise FasttrError on every rank unless all of them hold the same value."""
        found = self.gathered(value)
        differing = [rank for rank, other in enumerate(found) if other != found[0]]
        if differing:
            raise FasttrError(
                f"{what} of rank {differing[0]} is not that of rank 0: every process must be "
                "started on the same files with the same settings"
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error in the block, on any rank, is an error of all of them once each has left it.

        Nothing in the block may wait for another rank.
        """
        if self.world == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        told = self.gathered(None if error is None else one_line(error))
        if error is not None:
            raise error
        for rank, line in enumerate(told):
            if line is not None:
                raise FasttrError(f"rank {rank}: {line}")

    def first_alone(self, work: Callable[[], T], *, of_each_machine: bool = True) -> T:
        """`work` on the first rank (of each machine, or of all), then on the others, which find
        what it left on the disk; an error on one of them is an error of all."""
        if self.world == 1:
            return work()
        is_first = self.local_rank == 0 if of_each_machine else self.is_first
        results: list[T] = []
        for turn in (True, False):
            with self.together():
                if turn == is_first:
                    results.append(work())
        return results[0]


ALONE = Ranks()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and size + x.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.numel()
    if bucket:
        yield bucket


class PeerGone(FasttrError):
    """Another process of the run ended; nothing can be agreed on any more."""


def _wait_for_all(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:
        raise _gone(error) from error


def _gone(error: RuntimeError) -> PeerGone:
    return PeerGone(
        f"another process of the run is gone ({one_line(error)}); this one stops too: go on "
        "from the last checkpoint with --resume_from_checkpoint true"
    )


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed that torch called, inside a layer of divided weights."""
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed"))


@contextlib.contextmanager
def joined(use_cpu: bool, timeout: int = 1800, shard_size: int = 1) -> Iterator[Ranks]:
    """The ranks that a launcher (torchrun, accelerate) set up; alone without one.

    `timeout`: seconds after which a rank that nobody answers gives up. `shard_size`: see
    `Ranks.sharded`.
    """
    world = _number("WORLD_SIZE", 1)
    if world <= 1:
        yield Ranks().sharded(shard_size, on_gpu=False)
        return
    ranks = Ranks(_number("RANK", 0), world, _number("LOCAL_RANK", 0))
    on_gpu = torch.cuda.is_available() and not use_cpu
    if on_gpu:
        if ranks.local_rank >= torch.cuda.device_count():
            raise FasttrError(
                f"got process {ranks.local_rank} of this machine and "
                f"{torch.cuda.device_count()} GPUs; wanted one GPU for each process"
            )
        torch.cuda.set_device(ranks.local_rank)
    is_ours = not dist.is_initialized()
    if is_ours:
        # What hosts agree on never waits for a device: it goes through gloo.
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        limit = datetime.timedelta(seconds=timeout)
        _wait_for_all(lambda: dist.init_process_group(backend, timeout=limit))
    try:
        yield ranks.sharded(shard_size, on_gpu)
    except RuntimeError as error:
        if not _is_of_a_peer(error):
            raise
        raise _gone(error) from error
    except SystemExit:  # a signal, which all of them have agreed on
        if is_ours:
            dist.destroy_process_group()
        raise
    # After an error the others may never come to this line: the process just ends.
    if is_ours:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError as error:
        raise FasttrError(f"{name}: got {text!r} in the environment; wanted a number") from error
