"""Packed = prefix-shared = padded = one completion at a time: log-probs and every gradient, per
architecture in the tier that is exact for it."""

from __future__ import annotations

import pytest
import torch

from fasttr.batch import Tree
from fasttr.errors import FasttrError
from fasttr.models import attention
from fasttr.models.attention import own_attention
from fasttr.models.checks import check_head
from fasttr.models.policy import token_logps
from fasttr.models.probe import probe
from fasttr.packing.layout import pack
from fasttr.packing.tiers import unshared
from tests.architectures import ARCHITECTURES, TIERS, USUAL, VOCAB, WINDOW
from tests.tiny import (
    alone_logps,
    gradients,
    packed,
    packed_tiny,
    padded_logps,
    random_trees,
    tiny_config,
    tiny_model,
)

# Unequal lengths, one-token completions, an empty prompt, trees of one, two and three completions.
SHAPES = [(7, 5, 9), (3, 1, 4), (11, 2, 1, 6), (1, 8), (0, 4, 3)]


def weighted(logps: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(len(logps), generator=generator) * logps).sum()


def sum_loss(logp, ref_logp, groups):
    """The same weights when all completions are scored in one call."""
    return weighted(logp)


def assert_same(got_logps, got_grads, want_logps, want_grads):
    torch.testing.assert_close(got_logps, want_logps, atol=3e-5, rtol=1e-6)
    assert got_grads.keys() == want_grads.keys()
    for name, want in want_grads.items():
        error = (got_grads[name] - want).abs().max().item()
        assert error <= 2e-5 * (1 + want.abs().max().item()), f"{name}: {error:.2e}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_shared_padded_and_alone_agree(arch, checkpointing):
    tier = TIERS.get(arch, "shared")
    trees = random_trees(SHAPES)
    assert max(len(t.prompt_ids) + len(c) for t in trees for c in t.completions) > WINDOW
    plain = tiny_model(arch)
    plain.set_attn_implementation(own_attention(plain))
    alone = alone_logps(plain, trees)
    weighted(alone).backward()
    want = gradients(plain)
    assert len(want) == len(list(plain.parameters()))

    plain.zero_grad()
    padded = padded_logps(plain, trees)
    weighted(padded).backward()
    assert_same(padded, gradients(plain), alone, want)

    single = [
        unshared(Tree(i, t.prompt_ids, (c,))) for i, t in enumerate(trees) for c in t.completions
    ]
    for layout in (trees, single) if tier == "shared" else (single,):
        model = packed_tiny(arch, tier=tier)
        if checkpointing:
            model.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        batch = pack(layout)
        out = model(batch._replace(cu_groups=batch.cu_groups[[0, -1]]), sum_loss)
        out.loss.backward()
        assert_same(out.logp, gradients(model.model), alone.detach(), want)


@pytest.mark.parametrize("arch", ["mistral", "gemma3_text", "qwen2", "phi3"])
def test_the_window_matters(arch):
    """Guards the test above: without the window the log-probs differ."""
    assert tiny_config(arch).sliding_window == WINDOW
    trees = random_trees([(9, 7, 8)])
    windowed = alone_logps(tiny_model(arch), trees)
    wide = alone_logps(tiny_model(arch, sliding_window=100), trees)
    assert (windowed - wide).abs().max() > 1e-3


def test_the_base_model_is_refused_without_a_layout():
    model = packed_tiny()
    with pytest.raises(FasttrError, match="no packed layout"):
        model.model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)


def test_no_grad_scoring_is_bitwise_the_training_forward():
    """Step 0: policy = reference gives log-ratios of exactly 0."""
    trees = random_trees(SHAPES[:2])
    for checkpointing in (False, True):
        model = packed_tiny()
        if checkpointing:
            model.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        batch = pack(trees)
        scored = model.logps(batch)
        trained = model(batch, lambda logp, ref, groups: logp.sum(), stats=True)
        trained.loss.backward()
        assert torch.equal(scored, trained.logp)


@pytest.mark.parametrize("arch", USUAL)
def test_bf16_compute_stays_near_fp32_and_keeps_the_step_0_zero(arch):
    """Autocast on fp32 weights: every back end gets q, k and v of one dtype, and gradients come
    back in fp32."""
    trees = random_trees(SHAPES)
    exact = packed_tiny(arch)
    low = packed_tiny(arch)
    low.bf16 = True
    batch = pack(trees)
    want, scored = exact.logps(batch), low.logps(batch)
    out = low(batch, lambda logp, ref, groups: logp.sum())
    out.loss.backward()
    assert torch.equal(scored, out.logp)
    assert scored.dtype == torch.float32
    assert 0 < (scored - want).abs().max() < 0.02 * want.abs().max()
    assert {p.grad.dtype for p in low.parameters()} == {torch.float32}


def test_packed_helper_keeps_the_softcap():
    assert packed(tiny_model("gemma2", implementation="eager")).head.softcap == 3.0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_probe_finds_the_tier_and_the_head(arch):
    config = tiny_config(arch)
    support = probe(config)
    tier = TIERS.get(arch, "shared")
    assert support.best(4 * WINDOW) == tier
    check_head(packed_tiny(arch, tier=tier), "model_name_or_path", arch)


def test_a_head_with_a_bias_keeps_it():
    trees = random_trees(SHAPES)
    models = [tiny_model("llama"), tiny_model("llama", implementation=attention.register())]
    for model in models:
        torch.manual_seed(1)
        model.lm_head = torch.nn.Linear(32, VOCAB)
    plain, shared = models
    want = alone_logps(plain, trees)
    weighted(want).backward()
    out = packed(shared)(pack(trees), sum_loss)
    out.loss.backward()
    assert "lm_head.bias" in gradients(shared)
    assert_same(out.logp, gradients(shared), want, gradients(plain))
    batch = pack(trees)
    of_tokens = token_logps(packed(shared), batch).split(batch.cu_completions.diff().tolist())
    torch.testing.assert_close(torch.stack([x.sum() for x in of_tokens]), out.logp.detach())
