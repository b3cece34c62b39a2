"""The model of a step's time and of memory: counts that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from bench import model
from bench.shapes import SHAPES, build
from fasttr.cluster.step import Model, Work, step_seconds, useful_operations

LLAMA_8B, PYTHIA = SHAPES["llama-3-8b"], SHAPES["pythia-2.8b"]


@pytest.mark.parametrize("name", ["tiny", "tiny-neox", "qwen2.5-0.5b", "llama-3-8b", "pythia-2.8b"])
def test_parameters_are_counted_as_transformers_has_them(name):
    shape = SHAPES[name]
    # qwen2.5 has biases of q, k, v, which the benchmark's llama of that size does not.
    with torch.device("meta"):
        parameters = build(shape, torch.device("meta")).parameters()
    assert sum(p.numel() for p in parameters) == shape.parameters
    sizes = sorted(tuple(p.shape) for p in build(SHAPES["tiny"], torch.device("cpu")).parameters())
    assert sizes == sorted(SHAPES["tiny"].tensors())


def test_operations_of_a_step_are_the_textbooks():
    """6 operations a parameter of the layers and token, and the head on predicting rows alone."""
    work = Work(rows=1, tokens=1000, predicting=300, attended=0)
    layers = LLAMA_8B.layers * LLAMA_8B.layer_weights
    expected = 6 * layers * 1000 + 6 * 300 * LLAMA_8B.head_weights
    assert useful_operations(Model.of(LLAMA_8B), work) == pytest.approx(expected)
    assert layers == pytest.approx(6.98e9, rel=1e-3)


def test_attended_pairs_are_counted_as_a_causal_mask_has_them(monkeypatch):
    trees = model.make_trees("tiny", 8, vocabulary=8)
    monkeypatch.setattr(model, "SAMPLE", 8)
    monkeypatch.setattr(model, "make_trees", lambda *args, **kwargs: trees)
    work = model.work_of.__wrapped__("tiny", 8)
    seen = 0
    for tree in trees:
        p = len(tree.prompt_ids)
        lengths = [p, *(p + len(ids) for ids in tree.completions)]
        triangles = [int(torch.ones(n, n).tril().sum()) for n in lengths]
        seen += triangles[1] + triangles[2] - triangles[0]
    assert work.attended == seen
    assert work.predicting == sum(len(ids) for tree in trees for ids in tree.completions)


def test_every_change_of_the_plan_makes_a_step_shorter():
    for shape in (LLAMA_8B, PYTHIA):
        work = model.work_of("hh")
        of_shape = Model.of(shape)
        times = [step_seconds(of_shape, work, stage, model.H200).total for stage in model.STAGES]
        assert times == sorted(times, reverse=True)
        shares = [model.mfu(shape, work, stage, model.H200) for stage in model.STAGES]
        assert 0.3 < shares[0] < 0.4
        assert 0.5 < shares[3] < 0.65


def test_8b_with_a_moving_reference_fits_one_card_by_these_choices():
    """141 GB: bf16 moments beside masters. 80 GB: one pack a step, or no masters, or an adapter."""
    as_fp32, default, one_pack, *_ = model.SETTINGS

    def fits(setting, card):
        return model.plan_of(setting, "llama-3-8b", card).fits

    assert not fits(as_fp32, "h200")
    assert all(fits(setting, "h200") for setting in model.SETTINGS[1:])
    assert [fits(setting, "h100") for setting in model.SETTINGS] == [False, False, True, True, True]
    assert model.plan_of(default, "llama-3-8b", "h200").choices.moments == "bf16"
    assert not model.plan_of(one_pack, "llama-3-8b", "h100").choices.adds_packs
    assert "Model, not a measurement" in model.tables()
