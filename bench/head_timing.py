"""Time of one DPO head, forward and backward, on this CPU: `python -m bench.head_timing`.

The three bare products are the least that an exact head can take; plain torch keeps all logits.
Interleaved medians; a path whose loss or gradient is wrong prints no number.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fasttr_kernels.preference import linear_preference_loss, linear_preference_loss_ref
from torch import Tensor

SHAPES = [(2048, 128, 2048), (2048, 256, 8192), (4096, 512, 4096)]
LENGTH = 64  # rows of a completion


def _dpo(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
    ratio = logp if ref_logp is None else logp - ref_logp
    return -F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).sum()


def paths(T: int, D: int, V: int) -> dict[str, Callable[[], Tensor]]:
    """What is timed; each returns the gradient of the weight."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=make).requires_grad_()
    weight = (torch.randn(V, D, generator=make) / D**0.5).requires_grad_()
    target = torch.randint(V, (T,), generator=make)
    completions = torch.arange(0, T + 1, LENGTH)
    groups = torch.arange(0, len(completions), 2)

    def head(op: Callable, stats: bool) -> Tensor:
        hidden.grad = weight.grad = None
        out = op(
            hidden,
            weight,
            target,
            completions,
            groups,
            _dpo,
            ref_logp=None,
            normalizer=len(groups),
            stats=stats,
        )
        out.loss.backward()
        assert weight.grad is not None
        return weight.grad

    @torch.no_grad()
    def products() -> Tensor:
        z = hidden @ weight.t()
        torch.mm(z, weight)
        return z.t() @ hidden

    return {
        "three bare products": products,
        "plain torch": lambda: head(linear_preference_loss_ref, False),
        "fused": lambda: head(linear_preference_loss, False),
        "fused, statistics": lambda: head(linear_preference_loss, True),
        "plain torch, statistics": lambda: head(linear_preference_loss_ref, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head_timing", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(
        f"{torch.get_num_threads()} CPU threads, fp32, torch {torch.__version__}, median of "
        f"{rounds}, milliseconds"
    )
    for shape in SHAPES:
        some = paths(*shape)
        truth = some["plain torch"]().clone()
        for name, path in some.items():
            if name != "three bare products":
                torch.testing.assert_close(path(), truth, rtol=1e-3, atol=1e-6)
        times: dict[str, list[float]] = {name: [] for name in some}
        for _ in range(rounds):
            for name, path in some.items():
                start = time.perf_counter()
                path()
                times[name].append(1e3 * (time.perf_counter() - start))
        print(
            "T x D x V = %d x %d x %d: " % shape  # noqa: UP031
            + ", ".join(f"{name} {statistics.median(t):.0f}" for name, t in times.items())
        )


if __name__ == "__main__":
    main()
