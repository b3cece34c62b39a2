"""A model whose matrices are bf16 computes what it computed with fp32 weights under autocast: log-
probs and gradients, bit for bit, in every architecture."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fasttr.models.halves import add_remainders, remainders
from fasttr.models.load import ModelConfig, load_model, save_model
from fasttr.models.packed import PackedModel
from fasttr.optim.adamw import OptimizerConfig
from fasttr.optim.matrices import matrices
from fasttr.packing.layout import pack
from tests.architectures import ARCHITECTURES, USUAL
from tests.tiny import packed_tiny, random_trees, tiny_config

TREES = [random_trees([(5, 4, 6), (3, 7, 2)], seed=1), random_trees([(6, 3, 5)], seed=2)]


def in_bf16(arch: str) -> PackedModel:
    """A tiny model that computes in bf16, with fp32 weights of which none lies halfway between two
    bf16 numbers: there autocast rounds to even, and halves away from 0."""
    policy = packed_tiny(arch)
    policy.bf16 = True
    with torch.no_grad():
        for p in policy.parameters():
            bits = p.view(torch.int32)
            bits.add_((bits & 0xFFFF == 0x8000).int())
    return policy


def as_before(policy: PackedModel) -> torch.autocast:
    """What fp32 weights were read under: autocast with its cache."""
    return torch.autocast("cpu", torch.bfloat16)


def dpo_like(logp, ref_logp, groups):
    return torch.nn.functional.softplus(logp[1::2] - logp[0::2]).sum()


def gradients_of(policy: PackedModel, packs: list, in_place: bool) -> dict[str, torch.Tensor]:
    """fp32 gradients summed over packs; the head's in place of autograd's sum, or not."""
    head = policy.head_weight().weight
    for trees in packs:
        head_grad = head.grad if in_place else None
        policy(pack(trees), dpo_like, normalizer=3, head_grad=head_grad).loss.backward()
    return {name: p.grad.float() for name, p in policy.named_parameters()}


# Their experts are grouped products, which autocast leaves in fp32 where the weights are.
GROUPED = {"deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "nemotron_h", "qwen3_moe"}


@pytest.mark.parametrize("arch", sorted(GROUPED))
def test_experts_compute_in_bf16_too(arch, monkeypatch):
    whole, split = in_bf16(arch), in_bf16(arch)
    chosen = {name for name, p in split.named_parameters() if p in matrices(split.model)}
    OptimizerConfig().optimizer(split.model, bf16=True).begin_step(1)
    assert any(".experts." in name for name in chosen)
    assert not any("gate.weight" in name or "router" in name for name in chosen)
    batch = pack(TREES[0])
    want, got = whole.logps(batch), split.logps(batch)
    assert not torch.equal(got, want)
    assert ((got - want).abs() <= 0.03 * want.abs()).all()
    exact, found = (gradients_of(m, TREES[:1], in_place=False) for m in (whole, split))
    a, b = (torch.cat([g[name].flatten() for name in exact]) for g in (exact, found))
    assert torch.cosine_similarity(a, b, dim=0) > 0.999


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in GROUPED])
def test_logps_and_gradients_equal_those_of_fp32_weights_under_autocast(arch, monkeypatch):
    whole, split = in_bf16(arch), in_bf16(arch)
    optimizer = OptimizerConfig().optimizer(split.model, bf16=True)
    batch = pack(TREES[0])
    for packs in (TREES[:1], TREES):
        whole.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr(PackedModel, "autocast", as_before)
            want_logps = whole.logps(batch)
            want = gradients_of(whole, packs, in_place=False)
        optimizer.begin_step(len(packs))
        with split.weights_still():
            assert torch.equal(split.logps(batch), want_logps)
            got = gradients_of(split, packs, in_place=True)
        heads = {name for name, p in split.named_parameters() if p is split.head_weight().weight}
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            if name in heads and len(packs) > 1:
                # The head's product adds to what is there: one rounding less.
                assert (got[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max()
            else:
                assert torch.equal(got[name], gradient), name
        optimizer.zero_grad()


def test_matrices_of_layers_and_an_untied_head_are_bf16_and_all_else_is_fp32():
    for arch, tied in (("llama", False), ("qwen3", True), ("gpt_neox", False)):
        model = in_bf16(arch).model
        chosen = matrices(model)
        OptimizerConfig().optimizer(model, bf16=True)
        for name, p in model.named_parameters():
            is_layer_matrix = "layers." in name and p.ndim == 2
            is_head = p is model.get_output_embeddings().weight
            wanted = is_layer_matrix or (is_head and not tied)
            assert (p.dtype == torch.bfloat16) == wanted == (p in chosen), name
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}


def test_the_score_of_a_reward_model_stays_fp32():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1))
    OptimizerConfig().optimizer(model, bf16=True)
    assert model.score.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts casts of a shape to bf16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.found += tuple(out.shape) == tuple(self.shape)
        return out


@pytest.mark.parametrize(("arch", "casts"), [("qwen3", 1), ("llama", 0)])
def test_a_tied_head_is_cast_once_while_weights_stand_still(arch, casts):
    policy = in_bf16(arch)
    OptimizerConfig().optimizer(policy.model, bf16=True)
    counted = Casts(policy.head_weight().weight.shape)
    with counted, policy.weights_still():
        for trees in (*TREES, *TREES):
            policy.logps(pack(trees))
    assert counted.found == casts
    with counted:
        policy.logps(pack(TREES[0]))
    assert counted.found == 2 * casts, "outside, every call casts"


def test_a_model_that_is_not_trained_has_bf16_matrices_and_the_same_logps(tmp_path):
    tiny = in_bf16("llama").model
    tiny.fasttr_config = tiny.config
    tiny.save_pretrained(tmp_path)
    config = ModelConfig(str(tmp_path), bf16=True)
    trained = load_model(config)
    frozen = load_model(dataclasses.replace(config, is_trained=False))
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    chosen = {name for name, p in frozen.named_parameters() if p.dtype == torch.bfloat16}
    assert chosen == {n for n, p in trained.named_parameters() if p in matrices(trained.model)}
    batch = pack(TREES[0])
    assert torch.equal(frozen.logps(batch), trained.logps(batch))


@pytest.mark.parametrize("arch", [*USUAL, "gpt2", "gpt_oss", "mixtral"])
def test_a_bf16_folder_and_its_remainders_are_the_fp32_weights(arch, tmp_path):
    policy = in_bf16(arch)
    policy.model.fasttr_config = policy.model.config
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    optimizer = OptimizerConfig().optimizer(policy.model, bf16=True)
    dtypes = [p.dtype for p in policy.parameters()]
    save_model(policy, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path)
    assert [p.dtype for p in policy.parameters()] == dtypes, "as it was"
    low = remainders(policy, optimizer)
    assert low.keys() == before.keys()
    assert {x.dtype for x in low.values()} == {torch.int16}
    model = load_model(ModelConfig(str(tmp_path))).model
    for name, p in model.named_parameters():
        assert torch.equal(p, p.bfloat16().float()), "the folder is bf16"
        assert (p - before[name]).abs().max() <= 2**-8 * before[name].abs().max()
    add_remainders(model, low)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_nothing_keeps_copies_of_weights():
    policy = in_bf16("llama")
    with policy.autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert not torch.is_autocast_cache_enabled()
