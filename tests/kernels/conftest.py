"""Row functions as a parameter of tests: torch's, and Triton's (interpreted where there is no
GPU)."""

from __future__ import annotations

import pytest
import torch
from fasttr_kernels import chunks, rows_torch


@pytest.fixture(params=["torch", "triton"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        from fasttr_kernels import rows_triton as chosen
    else:
        chosen = rows_torch
    monkeypatch.setattr(chunks, "select", lambda device: chosen)
    return request.param


@pytest.fixture
def poisoned():
    """Memory that is not written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
