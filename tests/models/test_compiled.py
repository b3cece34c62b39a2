"""Compiled decoder layers: few graphs whatever the lengths, the values of eager layers, and the
refusals."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from fasttr import TrainConfig
from fasttr.errors import FasttrError
from fasttr.models.compiled import compile_layers, uncompiled
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.layout import pack
from tests.runs import run, steps
from tests.tiny import gradients, packed_tiny, random_trees
from tests.training.test_online import online

PACKS = [
    [(7, 5, 9), (3, 1, 4)],
    [(11, 2, 1, 6)],
    [(1, 8), (2, 3)],
    [(5, 5, 5), (6, 6, 6), (7, 7, 7)],
    [(4, 9)],
    [(9, 2), (1, 1)],
    [(3, 3, 3)],
    [(20, 10, 10)],
    [(2, 1)],
]


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def logps_and_gradients(model, trees):
    out = model(pack(trees), lambda logp, ref_logp, groups: logp.sum())
    model.zero_grad()
    out.loss.backward()
    return out.logp, gradients(model.model)


def more(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("arch", "kinds", "checkpointing"),
    [
        ("llama", 1, False),
        more("llama", 1, True),
        more("gemma2", 2, False),
        more("gemma2", 2, True),
        more("gpt_oss", 2, False),
        more("gpt_oss", 2, True),
    ],
)
def test_lengths_make_no_graphs_and_values_are_those_of_eager_layers(arch, kinds, checkpointing):
    eager, compiled = packed_tiny(arch), packed_tiny(arch)
    if checkpointing:
        compiled.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    assert compile_layers(compiled, True, backend="aot_eager")
    made = counters["stats"]["unique_graphs"]
    assert 2 * kinds <= made <= 4 * kinds
    for seed, shapes in enumerate(PACKS):
        trees = random_trees(shapes, seed)
        want, want_gradients = logps_and_gradients(eager, trees)
        got, got_gradients = logps_and_gradients(compiled, trees)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-6)
        for name, gradient in want_gradients.items():
            torch.testing.assert_close(got_gradients[name], gradient, atol=1e-4, rtol=1e-4)
        assert torch.equal(compiled.logps(pack(trees)), got)
    assert counters["stats"]["unique_graphs"] == made


def test_liger_stays_out_of_layers_whose_operations_a_compiler_fuses():
    def patches(device="cuda", **settings):
        return TrainConfig(**settings).model(torch.device(device)).use_liger_kernel

    assert patches() is False
    assert patches("cpu", compile=True) is False
    where_installed = None
    assert patches("cpu") is where_installed
    assert patches(compile=False) is where_installed
    assert patches(attention_tier="padded") is where_installed
    assert patches(use_liger_kernel=True) is True


def test_where_layers_are_not_compiled(capsys):
    on_a_cpu = packed_tiny()
    assert not compile_layers(on_a_cpu, None)
    assert not compile_layers(on_a_cpu, False)
    apart = packed_tiny("lfm2", tier="padded")
    with pytest.raises(FasttrError, match="got true, and the model's own attention in tier padded"):
        compile_layers(apart, True)


def test_a_layer_without_a_whole_graph_is_said_and_stays_eager():
    model = packed_tiny()
    layer = model.model.model.layers[1]
    forward = layer.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = broken
    with pytest.raises(FasttrError, match="a layer has no whole graph"):
        compile_layers(model, True, backend="aot_eager")
    batch = pack(random_trees([(3, 2, 4)]))
    assert torch.equal(model.logps(batch), packed_tiny().logps(batch))


@pytest.mark.parametrize(
    ("tokens", "positions", "longest"),
    [(None, 4096, 44), (1024, 4096, 23 * 44), (10**6, 4096, 61 * 44), (10**6, 100, 3 * 44)],
)
def test_first_packs_are_about_as_long_as_those_of_a_run(tokens, positions, longest):
    """A compiler lays out its kernels for the sizes that it meets first."""
    model = packed_tiny(max_position_embeddings=positions)
    seen = []
    model.model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].numel())
    )
    assert compile_layers(model, True, backend="eager", tokens=tokens)
    assert max(seen) == longest
    assert min(seen) == longest * 29 // 44, "and one that is shorter"


def test_a_graph_made_in_the_middle_of_a_run_is_said_and_finds_the_sums_over_packs(capsys):
    """fp32 gradients of bf16 weights, which torch would not trace."""
    compiled, eager = packed_tiny(), packed_tiny()
    assert compile_layers(compiled, True, backend="eager")
    batch = pack(random_trees([(3, 2, 4), (2, 6, 1)]))
    capsys.readouterr()
    compiled.logps(batch)
    found = []
    for model in (compiled, eager):
        model.bf16 = True
        with uncompiled(model):
            model.logps(batch)
        assert capsys.readouterr().out == "", "nothing was compiled yet"
        OptimizerConfig().optimizer(model.model, bf16=True).begin_step(packs=2)
        for _ in range(2):
            model(batch, lambda logp, ref_logp, groups: logp.sum()).loss.backward()
        found.append(gradients(model.model))
        said = capsys.readouterr().out
        assert ("compile: a layer is compiled once more" in said) == (model is compiled)
    for name, gradient in found[1].items():
        assert found[0][name].dtype == torch.float32
        assert torch.equal(found[0][name], gradient), name


@pytest.mark.slow
def test_a_compiled_run_begins_at_0_and_follows_the_eager_one(workspace, tmp_path):
    run(workspace, tmp_path / "eager", compile=False, ref_update="soft", ref_update_every=2)
    run(workspace, tmp_path / "compiled", compile=True, ref_update="soft", ref_update_every=2)
    eager, compiled = steps(tmp_path / "eager"), steps(tmp_path / "compiled")
    assert compiled[0]["rewards/margins"] == compiled[0]["ref/distance"] == 0
    for a, b in zip(eager, compiled, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5


def test_layers_are_compiled_after_their_weights_have_their_dtype(workspace, tmp_path, monkeypatch):
    """Graphs of fp32 weights would be made anew in the first step."""
    found = []
    monkeypatch.setattr(
        "fasttr.training.setup.compile_layers",
        lambda packed, asked, **_: found.append((asked, {p.dtype for p in packed.parameters()})),
    )
    run(workspace, tmp_path / "pairs", bf16=True, max_steps=1)
    online(workspace, tmp_path / "online", bf16=True, max_steps=1)
    assert found == 2 * [(None, {torch.bfloat16, torch.float32})]


@pytest.mark.slow
@pytest.mark.parametrize("train", ["pairs", "online"])
def test_a_compiled_run_in_bf16_of_several_packs_a_step_that_draws_samples(
    train, workspace, tmp_path, monkeypatch, capsys
):
    """All that a GPU has by default. Nothing is compiled again after the first packs."""
    monkeypatch.setattr(compile_layers, "__defaults__", ("aot_eager", None, None))
    changes = {"bf16": True, "compile": True, "max_tokens_per_batch": 64, "max_steps": 3}
    if train == "pairs":
        run(workspace, tmp_path, log_completions=True, logging_steps=1, **changes)
    else:
        online(workspace, tmp_path, **changes)
    said = capsys.readouterr().out
    assert "compile: done" in said
    assert "compiled once more" not in said
    assert len(steps(tmp_path)) == 3
