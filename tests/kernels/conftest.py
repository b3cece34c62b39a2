"""Row functions as a parameter of tests: torch's, and Triton's (interpreted where there is no
GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fasttr_kernels import chunks, rows_torch


def _patch_language_once() -> None:
    """Triton's interpreter goes through its whole language anew for every call of one kernel
    function from another, which takes most of its time: once a launch is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    whole = interpreter._patch_lang

    def patch(fn: Any) -> Any:
        languages = [x for x in fn.__globals__.values() if x is tl or x is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return whole(fn)
        return interpreter._LangPatchScope() if hasattr(interpreter, "_LangPatchScope") else None

    interpreter._patch_lang = patch


if not torch.cuda.is_available():
    _patch_language_once()


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
