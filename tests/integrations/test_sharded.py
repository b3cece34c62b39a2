"""A head in shards: refused by the ops, made whole by the helper, gradients back to the shards."""

from __future__ import annotations

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist

from fasttr.errors import FasttrError
from fasttr.integrations import LinearPreferenceLoss, whole

V, D, S, WORLD = 12, 4, 5, 2


def rows_of(rank: int):
    """Two pairs of a rank: hidden states, labels and reference log-probs."""
    make = torch.Generator().manual_seed(rank)
    hidden = torch.randn(4, S, D, generator=make, dtype=torch.float64)
    return hidden, torch.randint(V, (4, S), generator=make), torch.zeros(4, dtype=torch.float64)


def head() -> torch.Tensor:
    make = torch.Generator().manual_seed(9)
    return torch.randn(V, D, generator=make, dtype=torch.float64).requires_grad_()


def gradient_of(rank: int, weight: torch.Tensor) -> torch.Tensor:
    hidden, labels, ref_logp = rows_of(rank)
    loss = LinearPreferenceLoss("sigmoid", beta=0.5)(hidden, weight, labels, ref_logp).loss
    return torch.autograd.grad(loss, weight)[0]


def _rank(rank: int, port: int, queue) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        weight = distribute_tensor(head().detach(), mesh, [Shard(0)]).requires_grad_()
        hidden, labels, ref_logp = rows_of(rank)
        module = LinearPreferenceLoss("sigmoid", beta=0.5)
        try:
            module(hidden, weight, labels, ref_logp)
            refusal = "none"
        except ValueError as error:
            refusal = str(error)
        found = {"refusal": refusal}
        for reduce in ("avg", "sum"):
            weight.grad = None
            module(hidden, whole(weight, reduce), labels, ref_logp).loss.backward()
            assert weight.grad.to_local().shape == (V // WORLD, D)
            found[reduce] = weight.grad.full_tensor().tolist()
        if rank == 0:
            queue.put(found)
    finally:
        dist.destroy_process_group()


def test_each_rank_s_gradient_of_its_rows_reaches_the_shards():
    context = multiprocessing.get_context("forkserver")
    # The server of tests.several, where that has started it: torch is imported there once.
    context.set_forkserver_preload(["tests.killed", "tests.several"])
    queue = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(r, port, queue)) for r in range(WORLD)]
    for rank in ranks:
        rank.start()
    found = queue.get(timeout=120)
    for rank in ranks:
        rank.join()
    assert "DTensor" in found["refusal"]
    assert "fasttr.integrations.whole" in found["refusal"]
    alone = [gradient_of(rank, head()) for rank in range(WORLD)]
    assert (alone[0] - alone[1]).abs().max() > 0.01
    torch.testing.assert_close(torch.tensor(found["sum"], dtype=torch.float64), sum(alone))
    torch.testing.assert_close(torch.tensor(found["avg"], dtype=torch.float64), sum(alone) / WORLD)


def test_a_plain_tensor_stays_itself():
    weight = head()
    assert whole(weight) is weight
    assert whole(None) is None
    with pytest.raises(FasttrError, match="wanted one of avg, sum"):
        whole(weight, "mean")
