"""The GPU's attention back ends on a CPU: stand-ins made from their documentation get the arguments
that give the segments' result.

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, Dh head width.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fasttr.errors import FasttrError
from fasttr.models import attention
from fasttr.models.gather import gather_rows
from fasttr.models.segments import attend_segments, visible
from fasttr.packing.layout import pack
from tests.tiny import WINDOW, packed_tiny, random_trees

H, HKV, DH = 4, 2, 8
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Two prompts shared by two and three completions: queries and keys have other offsets.
LAYOUT = pack(random_trees([(7, 5, 3), (2, 1, 4, 6)])).attention


def random_qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, Dh), and twice (S, Hkv, Dh) as the layout gathers them."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(LAYOUT.q_lengths)
    q = torch.randn(rows, H, DH, generator=generator)
    k, v = (torch.randn(rows, HKV, DH, generator=generator) for _ in range(2))
    return q, gather_rows(k, LAYOUT.keys), gather_rows(v, LAYOUT.keys)


def documented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> Tensor:
    """FlashAttention's definition: query i of lq sees key j of lk when
    i + lk - lq - left <= j <= i + lk - lq + right, and -1 means no end."""
    assert q.shape[1] == k.shape[1]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert all(x.is_contiguous() for x in (q, k, v))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    left, right = window
    outputs = []
    for segment in range(len(cu_q) - 1):
        queries = q[cu_q[segment] : cu_q[segment + 1]].transpose(0, 1)
        keys = k[cu_k[segment] : cu_k[segment + 1]].transpose(0, 1)
        values = v[cu_k[segment] : cu_k[segment + 1]].transpose(0, 1)
        lq, lk = queries.shape[1], keys.shape[1]
        place = torch.arange(lq)[:, None] + lk - lq
        column = torch.arange(lk)[None]
        seen = torch.ones(lq, lk, dtype=torch.bool)
        if left >= 0:
            seen &= column >= place - left
        if right >= 0:
            seen &= column <= place + right
        scores = queries @ keys.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        share = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((share @ values).transpose(0, 1))
    return torch.cat(outputs)


def varlen_module(takes_groups: bool) -> ModuleType:
    """torch.nn.attention.varlen as its documentation has it, with or without grouped heads."""
    module = ModuleType("torch.nn.attention.varlen")

    def with_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return documented_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)

    def without_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return documented_attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)

    module.varlen_attn = with_groups if takes_groups else without_groups
    return module


def flash_module() -> ModuleType:
    """flash_attn as its documentation has it: grouped heads need no word."""
    module = ModuleType("flash_attn")

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap
    ):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        window = (window_size[0], 0) if causal else window_size
        return documented_attention(
            q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, window, softcap
        )

    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


@pytest.fixture
def _no_memory_of_other_versions():
    attention.varlen_takes_grouped_heads.cache_clear()
    yield
    attention.varlen_takes_grouped_heads.cache_clear()


@pytest.mark.usefixtures("_no_memory_of_other_versions")
@pytest.mark.parametrize("takes_groups", [True, False], ids=["grouped heads", "repeated heads"])
@pytest.mark.parametrize("window", [None, WINDOW, 1])
def test_varlen_gets_the_arguments_of_the_segments(monkeypatch, window, takes_groups):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen_module(takes_groups))
    q, k, v = random_qkv()
    got = attention.attend_varlen(q, k, v, LAYOUT, 0.3, window, None)
    want = attend_segments(q, k, v, LAYOUT, 0.3, window, None)
    torch.testing.assert_close(got, want)
    unbounded = attend_segments(q, k, v, LAYOUT, 0.3, None, None)
    assert torch.equal(want, unbounded) == (window is None)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_flash_gets_the_arguments_of_the_segments(monkeypatch, window, softcap):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_module())
    q, k, v = random_qkv()
    got = attention.attend_flash(q, k, v, LAYOUT, 0.3, window, softcap)
    want = attend_segments(q, k, v, LAYOUT, 0.3, window, softcap)
    torch.testing.assert_close(got, want)


def test_a_window_counts_the_token_itself():
    """Two queries at the end of four keys, a window of two tokens."""
    seen = visible(2, 4, 2, CPU)
    assert seen.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert visible(2, 3, None, CPU).tolist() == [[True, True, False], [True, True, True]]


def test_the_back_end_is_what_was_asked_for_and_the_device_has(monkeypatch):
    assert attention.backend_for(None, CUDA, bf16=True) == "varlen"
    assert attention.backend_for(None, CUDA, bf16=False) == "segments"
    assert attention.backend_for(None, CPU, bf16=True) == "segments"
    assert attention.backend_for("eager", CUDA, bf16=True) == "segments"
    assert attention.backend_for("varlen", CUDA, bf16=True) == "varlen"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert attention.backend_for("flash_attention_2", CUDA, bf16=True) == "flash"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for asked, device, expected in (
        ("flash_attention_2", CUDA, r"pip install 'fasttr\[flash\]'"),
        ("varlen", CPU, "got varlen on cpu with bf16 true"),
        ("nope", CUDA, "got 'nope'; wanted one of sdpa"),
    ):
        with pytest.raises(FasttrError, match=expected):
            attention.backend_for(asked, device, bf16=True)


def refused(**changes) -> str:
    """Why a call of the attention function is refused."""
    layer = packed_tiny("llama").model.model.layers[0].self_attn
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv())
    call = {"attention_mask": None, "fasttr_layout": LAYOUT, **changes}
    with pytest.raises(FasttrError) as raised:
        attention.packed_attention(layer, q, k, v, **call)
    return str(raised.value)


def test_what_a_layout_cannot_say_is_refused():
    assert "no packed layout" in refused(fasttr_layout=None)
    assert "got a mask" in refused(attention_mask=torch.ones(1))
    assert "got dropout 0.1" in refused(dropout=0.1)
    assert "attention sinks" in refused(s_aux=torch.ones(H))


def test_a_layer_that_is_not_causal_is_refused():
    layer = packed_tiny("llama").model.model.layers[0].self_attn
    layer.is_causal = False
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv())
    with pytest.raises(FasttrError, match="a layer that is not causal"):
        attention.packed_attention(layer, q, k, v, None, fasttr_layout=LAYOUT)


def test_a_window_that_never_arrives_is_refused():
    """Architectures that keep their window in the mask alone would be silently wrong."""
    layer = packed_tiny("mistral").model.model.layers[0].self_attn
    query = torch.randn(1, 4, WINDOW + 1, 8)
    key = torch.randn(1, 2, WINDOW + 1, 8)
    layout = pack(random_trees([(3, WINDOW - 2)])).attention
    attention.packed_attention(
        layer, query, key, key, None, sliding_window=WINDOW, fasttr_layout=layout
    )
    with pytest.raises(FasttrError, match="configured for a window of 5"):
        attention.packed_attention(layer, query, key, key, None, fasttr_layout=layout)
