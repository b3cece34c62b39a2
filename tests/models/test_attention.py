"""What transformers hands to the attention function, and what torch's FlashAttention is handed.

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, Dh head width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasttr.errors import FasttrError
from fasttr.models import attention
from fasttr.models.backend import Offsets, Scores
from fasttr.models.flash import TorchFlash
from fasttr.models.segments import Segments
from fasttr.packing.layout import pack
from tests.architectures import WINDOW
from tests.tiny import packed_tiny, random_trees, tiny_config

H, HKV, DH = 4, 2, 8
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Two prompts shared by two and three completions: queries and keys have other offsets.
LAYOUT = pack(random_trees([(7, 5, 3), (2, 1, 4, 6)])).attention
OFFSETS = Offsets(LAYOUT.cu_q, LAYOUT.cu_k, LAYOUT.on_host)


def random_qkv(rows_k: int, width_v: int = DH) -> tuple[Tensor, Tensor, Tensor]:
    """(T, H, Dh), (rows_k, Hkv, Dh), (rows_k, Hkv, width_v)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(int(LAYOUT.cu_q[-1]), H, DH, generator=generator)
    k = torch.randn(rows_k, HKV, DH, generator=generator)
    v = torch.randn(rows_k, HKV, width_v, generator=generator)
    return q, k, v


class AtenOp:
    """Takes an op's place, binds a call's arguments by the op's own schema and keeps them."""

    def __init__(self, name: str, results: tuple[Tensor, ...]):
        self.schema = getattr(torch.ops.aten, name).default._schema
        self.results = results
        self.bound: dict[str, object] = {}

    def __call__(self, *args: object, **kwargs: object) -> tuple[Tensor, ...]:
        places = [a.name for a in self.schema.arguments if not a.kwarg_only]
        names = {a.name for a in self.schema.arguments}
        assert len(args) == len(places), "every argument without a default"
        assert set(kwargs) <= names
        self.bound = {**dict(zip(places, args, strict=True)), **kwargs}
        return self.results


def documented(bound: dict[str, object]) -> Tensor:
    """FlashAttention's definition: query i of lq sees key j of lk when
    i + lk - lq - left <= j <= i + lk - lq + right; -1 is no end, and causal is a right of 0."""
    q, k, v = bound["query"], bound["key"], bound["value"]
    cu_q, cu_k = bound["cum_seq_q"], bound["cum_seq_k"]
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (bound["max_q"], bound["max_k"]) == (cu_q.diff().max(), cu_k.diff().max())
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for segment in range(len(cu_q) - 1):
        queries = q[cu_q[segment] : cu_q[segment + 1]].transpose(0, 1)
        keys = k[cu_k[segment] : cu_k[segment + 1]].transpose(0, 1)
        values = v[cu_k[segment] : cu_k[segment + 1]].transpose(0, 1)
        lq, lk = queries.shape[1], keys.shape[1]
        place = torch.arange(lq)[:, None] + lk - lq
        column = torch.arange(lk)[None]
        seen = column <= place + bound["window_size_right"]
        if bound["window_size_left"] >= 0:
            seen &= column >= place - bound["window_size_left"]
        scores = (queries @ keys.transpose(1, 2) * bound["scale"]).masked_fill(~seen, -torch.inf)
        outputs.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("width_v", [DH, DH - 3])
@pytest.mark.parametrize("window", [0, WINDOW, 1])
def test_flash_of_torch_gets_the_arguments_of_the_segments(monkeypatch, window, width_v):
    q, k, v = random_qkv(int(LAYOUT.cu_k[-1]), width_v)
    scores = Scores(0.3, window)
    empty = torch.empty(0)
    op = AtenOp("_flash_attention_forward", (torch.zeros(len(q), H, DH), empty))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    out, _ = TorchFlash().forward(q, k, v, OFFSETS, scores)
    want, _ = Segments().forward(q, k, v, OFFSETS, scores)
    assert out.shape == want.shape
    torch.testing.assert_close(documented(op.bound)[..., :width_v], want)
    assert (op.bound["dropout_p"], op.bound["is_causal"]) == (0.0, True)
    unbounded, _ = Segments().forward(q, k, v, OFFSETS, Scores(0.3))
    assert torch.equal(want, unbounded) == (window == 0)


def test_flash_of_torch_gets_the_same_arguments_backward(monkeypatch):
    q, k, v = random_qkv(int(LAYOUT.cu_k[-1]), DH - 3)
    scores = Scores(0.3, WINDOW)
    out, lse = Segments().forward(q, k, v, OFFSETS, scores)
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(k)
    op = AtenOp("_flash_attention_backward", grads)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", op)
    dq, dk, dv = TorchFlash().backward(torch.ones_like(out), q, k, v, out, lse, OFFSETS, scores)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    torch.testing.assert_close(documented(op.bound)[..., : DH - 3], out)
    assert op.bound["out"].shape == op.bound["grad_out"].shape == q.shape
    assert op.bound["grad_out"][..., DH - 3 :].abs().max() == 0
    assert op.bound["logsumexp"] is lse


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


def said_of(architecture: str, backend: str, capsys, **changes) -> str:
    attention.announce_slow(tiny_config(architecture, **changes), backend)
    return capsys.readouterr().out


def test_what_flash_attention_cannot_do_is_said_before_a_run(capsys):
    assert "no soft cap on scores; pip install" in said_of("gemma2", "varlen", capsys)
    assert said_of("gemma2", "flash", capsys) == said_of("gemma2", "segments", capsys) == ""
    for backend in ("varlen", "flash"):
        assert said_of("llama", backend, capsys, head_dim=64) == ""
        assert "no heads of width 36" in said_of("llama", backend, capsys, head_dim=36)
        assert "no heads of width 264" in said_of("llama", backend, capsys, head_dim=264)
    latent = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    assert said_of("deepseek_v3", "varlen", capsys, **latent) == ""
    assert said_of("llama", "segments", capsys, head_dim=36) == ""


def refused(**changes) -> str:
    """Why a call of the attention function is refused."""
    layer = packed_tiny("llama").model.model.layers[0].self_attn
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv(int(LAYOUT.cu_q[-1])))
    call = {"attention_mask": None, "fasttr_layout": LAYOUT, **changes}
    with pytest.raises(FasttrError) as raised:
        attention.packed_attention(layer, q, k, v, **call)
    return str(raised.value)


def test_what_a_layout_cannot_say_is_refused():
    assert "no packed layout" in refused(fasttr_layout=None)
    assert "got a mask" in refused(attention_mask=torch.ones(1))
    assert "got dropout 0.1" in refused(dropout=0.1)


def test_a_layer_that_is_not_causal_is_refused():
    layer = packed_tiny("llama").model.model.layers[0].self_attn
    layer.is_causal = False
    q, k, v = (x.transpose(0, 1)[None] for x in random_qkv(int(LAYOUT.cu_q[-1])))
    with pytest.raises(FasttrError, match="a layer that is not causal"):
        attention.packed_attention(layer, q, k, v, None, fasttr_layout=LAYOUT)
