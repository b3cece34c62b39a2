"""The attention op against softmax written out with a dense mask, values and every gradient."""

import itertools

import pytest
import torch

from fasttr.models import segments
from fasttr.models.attend import attend
from fasttr.models.backend import Scores
from fasttr.models.flash import TorchFlash
from fasttr.packing.layout import pack
from tests.tiny import random_trees

SHAPES = [(5, 3, 4, 1), (0, 2, 3), (4, 6), (1, 1, 1)]
HEADS, KEY_HEADS, WIDTH = 4, 2, 8

CASES = {
    "plain": (Scores(0.3), WIDTH, False),
    "window": (Scores(0.3, window=3), WIDTH, False),
    "softcap": (Scores(0.7, softcap=1.5), WIDTH, False),
    "sinks": (Scores(0.3), WIDTH, True),
    "narrow values": (Scores(0.3), WIDTH - 3, False),
    "all": (Scores(0.7, window=4, softcap=1.5), WIDTH - 3, True),
}


def visible(trees, window):
    """(T, T): what each packed token sees, token by token from the trees."""
    owners = []  # (tree, completion or None, position)
    for b, tree in enumerate(trees):
        prompt = len(tree.prompt_ids)
        owners += [(b, None, i) for i in range(prompt)]
        for c, completion in enumerate(tree.completions):
            owners += [(b, c, prompt + i) for i in range(len(completion))]
    seen = torch.zeros(len(owners), len(owners), dtype=torch.bool)
    for (i, query), (j, key) in itertools.product(enumerate(owners), repeat=2):
        same = query[0] == key[0] and key[1] in (None, query[1])
        seen[i, j] = same and 0 <= query[2] - key[2] < (window or 10**9)
    return seen


def written_out(q, k, v, sinks, trees, scores):
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * scores.scale
    if scores.softcap:
        s = torch.tanh(s / scores.softcap) * scores.softcap
    s = s.masked_fill(~visible(trees, scores.window), -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    p = torch.softmax(s, -1)[..., : len(k)]
    return torch.einsum("hqk,khd->qhd", p, v)


def inputs(trees, width_v, with_sinks, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows = len(pack(trees).input_ids)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k = draw(rows, HEADS, WIDTH), draw(rows, KEY_HEADS, WIDTH)
    v = draw(rows, KEY_HEADS, width_v)
    sinks = draw(HEADS) if with_sinks else None
    return [None if x is None else x.requires_grad_() for x in (q, k, v, sinks)]


@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize("fused", [True, False], ids=["torch's kernel", "written out"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, fused, block, monkeypatch):
    scores, width_v, with_sinks = CASES[case]
    monkeypatch.setattr(segments, "BLOCK", block)
    if not fused:
        monkeypatch.setattr(segments, "has_cpu_kernel", lambda *_: False)
    trees = random_trees(SHAPES)
    tensors = inputs(trees, width_v, with_sinks)
    got = attend(*tensors[:3], pack(trees).attention, scores, "segments", tensors[3])
    want = written_out(*tensors, trees, scores)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    given = [x for x in tensors if x is not None]
    got_grads = torch.autograd.grad((got * weight).sum(), given)
    want_grads = torch.autograd.grad((want * weight).sum(), given)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", ["window", "all"])
def test_the_op_keeps_the_rules_of_an_op(case):
    """Its schema, its fake kernel, its autograd registration and dynamic shapes."""
    scores, width_v, with_sinks = CASES[case]
    trees = random_trees(SHAPES)
    layout = pack(trees).attention
    q, k, v, sinks = inputs(trees, width_v, with_sinks)
    arguments = (
        *(q, k, v, sinks, layout.cu_q, layout.cu_k, layout.on_host),
        *layout.keys,
        *scores,
        "segments",
    )
    torch.library.opcheck(torch.ops.fasttr.attend.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.fasttr.attend(*arguments)
    saved = [None if x is None else x.detach() for x in (q, k, v, sinks)]
    backward = (torch.ones_like(out), *saved, out, lse, *arguments[4:])
    torch.library.opcheck(torch.ops.fasttr.attend_backward.default, backward)


def lying_as_its_inputs(monkeypatch):
    """torch's FlashAttention in place of itself: exact results, each in memory as its input."""
    exact = segments.Segments()

    def forward(self, q, k, v, offsets, scores):
        out, lse = exact.forward(q, k, v, offsets, scores)
        return torch.empty_like(q).copy_(out), lse

    def backward(self, grad, q, k, v, *others):
        found = exact.backward(grad, q, k, v, *others)
        return [torch.empty_like(x).copy_(d) for x, d in zip((q, k, v), found, strict=True)]

    monkeypatch.setattr(TorchFlash, "forward", forward)
    monkeypatch.setattr(TorchFlash, "backward", backward)


@pytest.mark.parametrize("shapes", [SHAPES, [(4, 6), (3, 5)]], ids=["shared", "nothing shared"])
def test_results_lie_as_a_compiled_layer_was_promised(shapes, monkeypatch):
    """Queries and keys heads first in memory, as they are behind partial rotary embeddings."""
    lying_as_its_inputs(monkeypatch)
    trees = random_trees(shapes)
    layout = pack(trees).attention
    heads_first = (x.transpose(0, 1).contiguous() for x in inputs(trees, WIDTH, False)[:3])
    q, k, v = (x.transpose(0, 1).detach().requires_grad_() for x in heads_first)
    arguments = (q, k, v, None, layout.cu_q, layout.cu_k, layout.on_host, *layout.keys)
    out, lse = torch.ops.fasttr.attend(*arguments, *Scores(0.3), "varlen")
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    promised = torch.autograd.grad(
        torch.ops.fasttr.attend(*arguments, *Scores(0.3), "segments")[0].sum(), (q, k, v)
    )
    assert not q.is_contiguous()
    assert all(x.is_contiguous() for x in (out, lse))
    for got, want in zip(grads, promised, strict=True):
        assert got.stride() == want.stride()
        assert torch.equal(got, want)


def test_bf16_rounds_once():
    """Scores and probabilities in fp32: half a unit of bf16 on the result, and little more."""
    trees = random_trees([(20, 30, 25)])
    for case in ("plain", "all"):
        scores, width_v, with_sinks = CASES[case]
        tensors = inputs(trees, width_v, with_sinks, torch.bfloat16)
        got = attend(*tensors[:3], pack(trees).attention, scores, "segments", tensors[3])
        assert got.dtype == torch.bfloat16
        exact = [None if x is None else x.detach().double() for x in tensors]
        want = written_out(*exact, trees, scores)
        assert (got.double() - want).abs().max() < 2**-7 * want.abs().max()


def test_what_is_kept_for_the_backward_is_not_gathered():
    """A shared prompt's keys are kept once, not once a completion."""
    trees = random_trees([(40, 2, 2, 2, 2)])
    rows = len(pack(trees).input_ids)
    kept = []
    q, k, v, _ = inputs(trees, WIDTH, False)

    def note(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        attend(q, k, v, pack(trees).attention, Scores(0.3), "segments")
    wide = [x for x in kept if x.is_floating_point()]
    assert all(len(x) == rows or x.shape == (HEADS, rows) for x in wide)
    assert len(wide) == 5  # q, k, v, the output and its log-sum-exp
