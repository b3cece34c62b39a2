"""The reference update on a CPU: torch's own sweep where its bits are ours."""

from __future__ import annotations

import pytest
import torch
from fasttr_kernels import lerp_torch, multi_tensor_lerp_

SIZES = [1, 37, 4096]  # torch runs in vectors, and ends without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [0.5, 0.25, 2.0**-10, 0.6])
def test_torchs_update_is_called_where_it_rounds_as_ours(alpha, dtype, monkeypatch):
    """A product with a power of two is exact: whether it is fused with the sum changes nothing."""
    called = []
    of_torch = torch._foreach_lerp_

    def counted(*args):
        called.append(args)
        return of_torch(*args)

    monkeypatch.setattr(torch, "_foreach_lerp_", counted)
    generator = torch.Generator().manual_seed(0)
    references, policies = (
        [torch.randn(n, generator=generator).to(dtype) for n in SIZES] for _ in range(2)
    )
    in_blocks = [x.clone() for x in references]
    items = [lerp_torch.Item(r, p, None) for r, p in zip(in_blocks, policies, strict=True)]
    lerp_torch.update(items, alpha, stochastic=False, seed=0)
    multi_tensor_lerp_(references, policies, alpha)
    assert bool(called) == (alpha != 0.6)
    for got, want in zip(references, in_blocks, strict=True):
        assert torch.equal(got, want)
