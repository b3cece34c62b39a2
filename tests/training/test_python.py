"""A run that Python drives: objects in place of names give the run that the names give."""

import json

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr import TrainConfig, train
from fasttr.data.in_memory import ListTrees
from fasttr.data.load import DataConfig, load_trees
from fasttr.errors import FasttrError
from fasttr.losses import LOSSES, LossInputs, as_loss
from tests.runs import (
    assert_same_run,
    evaluations,
    read_rows,
    run,
    same_weights,
    settings,
    steps,
    weights,
)
from tests.tiny import random_trees


def config(workspace, output_dir, **changes) -> TrainConfig:
    """Of a run whose model and rows come from Python."""
    values = settings(workspace, output_dir, **changes)
    return TrainConfig(**{**values, "model_name_or_path": None, "dataset_name": None})


@pytest.fixture
def model(workspace):
    return AutoModelForCausalLM.from_pretrained(workspace / "model")


@pytest.fixture
def tokenizer(workspace):
    return AutoTokenizer.from_pretrained(workspace / "model")


def rows_as_list(path, tokenizer):
    return read_rows(path)


def rows_as_dataset(path, tokenizer):
    return datasets.Dataset.from_list(read_rows(path))


def rows_as_trees(path, tokenizer):
    return load_trees(tokenizer, DataConfig(str(path), max_length=64))


@pytest.mark.parametrize("rows_as", [rows_as_list, rows_as_dataset, rows_as_trees])
def test_a_loaded_model_and_rows_in_memory_give_the_run_of_their_names(
    workspace, tmp_path, model, tokenizer, rows_as
):
    changes = {"ref_update": "soft", "ref_update_every": 2, "eval_strategy": "steps"}
    held_out = workspace / "test.jsonl"
    run(workspace, tmp_path / "named", eval_dataset_name=str(held_out), **changes)
    train(
        config(workspace, tmp_path / "given", **changes),
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows_as(workspace / "train.jsonl", tokenizer),
        eval_dataset=rows_as(held_out, tokenizer),
    )
    assert_same_run(tmp_path / "given", tmp_path / "named")
    assert evaluations(tmp_path / "given")


def test_a_given_model_is_trained_in_place_and_given_back_as_it_was(
    workspace, tmp_path, model, tokenizer
):
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.model.extra = nn.Dropout(0.3)
    model.eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = read_rows(workspace / "train.jsonl")
    result = train(
        config(workspace, tmp_path), model=model, tokenizer=tokenizer, train_dataset=rows
    )
    assert result.model is model
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)
    saved = weights(tmp_path)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters() if name in saved)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.attention_dropout == 0.1
    assert model.model.layers[0].self_attn.attention_dropout == 0.1
    assert model.model.extra.p == 0.3
    assert not model.training
    assert json.loads((tmp_path / "config.json").read_text())["attention_dropout"] == 0.1
    ids = tokenizer("alpha beta", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > 3


def test_a_given_model_resumes_bitwise(workspace, tmp_path, tokenizer):
    rows = read_rows(workspace / "train.jsonl")
    changes = {"ref_update": "hard", "ref_update_every": 2, "save_strategy": "steps"}

    def go(folder, **more):
        model = AutoModelForCausalLM.from_pretrained(workspace / "model")
        train(
            config(workspace, folder, save_steps=3, **changes, **more),
            model=model,
            tokenizer=tokenizer,
            train_dataset=rows,
        )

    go(tmp_path / "whole")
    go(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_a_function_as_loss_is_the_loss_that_it_computes(workspace, tmp_path):
    def dpo(inputs: LossInputs):
        u, v = inputs.chosen_logratio, inputs.rejected_logratio
        return -nn.functional.logsigmoid(0.1 * (u - v))

    named = run(workspace, tmp_path / "named", loss_type="sigmoid", ref_update="hard")
    given = train(
        TrainConfig(**settings(workspace, tmp_path / "given", ref_update="hard")), loss=dpo
    )
    assert same_weights(tmp_path / "given", tmp_path / "named")
    assert given.metrics["rewards/margins"] == named.metrics["rewards/margins"]


def test_a_function_as_loss_resumes_in_another_process(workspace, tmp_path):
    """There it is the same function at another address."""

    def margin(inputs: LossInputs):
        return inputs.rejected_logratio - inputs.chosen_logratio

    def again(beta):
        def margin(inputs: LossInputs):
            return inputs.rejected_logratio - inputs.chosen_logratio

        return margin

    first, second = again(1), again(2)
    assert str(first) != str(second)
    values = settings(workspace, tmp_path / "whole", save_strategy="steps", save_steps=3)
    train(TrainConfig(**values), loss=first)
    half = str(tmp_path / "whole" / "checkpoint-3")
    values |= {"output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": half}
    train(TrainConfig(**values), loss=second)
    assert same_weights(tmp_path / "resumed", tmp_path / "whole")
    with pytest.raises(FasttrError, match=r"was made with the loss .*again.*; got .*margin"):
        train(TrainConfig(**values), loss=margin)


@pytest.mark.parametrize(
    ("loss_type", "completions"), [("sft", 2), ("sigmoid", 3), ("kto", 3)], ids=str
)
def test_trees_hold_the_completions_that_the_loss_reads(
    workspace, tmp_path, model, tokenizer, loss_type, completions
):
    trees = ListTrees(random_trees([(3, *[4] * completions)] * 8))
    with pytest.raises(FasttrError, match=f"got trees of {completions} completions; wanted"):
        train(
            config(workspace, tmp_path, loss_type=loss_type),
            model=model,
            tokenizer=tokenizer,
            train_dataset=trees,
        )


def test_a_loss_object_says_what_it_reads(workspace, tmp_path):
    """One that needs no reference is given none, and cannot have one that moves."""

    class Simple:
        needs_reference = False

        def __call__(self, inputs: LossInputs):
            assert inputs.ref_logp is None
            return -(inputs.chosen_logp - inputs.rejected_logp) / 100

    train(TrainConfig(**settings(workspace, tmp_path / "a")), loss=Simple())
    assert "ref/distance" not in steps(tmp_path / "a")[0]
    with pytest.raises(FasttrError, match="the given loss has no reference"):
        train(TrainConfig(**settings(workspace, tmp_path / "b", ref_update="hard")), loss=Simple())


def test_a_loss_reads_numbers_that_came_with_the_trees(tokenizer, workspace, tmp_path, model):
    trees = [
        tree._replace(per_completion={"margin": [float(row), -1.0]})
        for row, tree in enumerate(random_trees([(3, 4, 2)] * 8))
    ]
    seen = []

    def loss(inputs: LossInputs):
        margin = inputs.per_completion["margin"]
        seen.append(margin.tolist())
        return inputs.chosen_logratio - margin[::2]

    train(
        config(workspace, tmp_path, max_steps=2, train_sampling_strategy="sequential"),
        model=model,
        tokenizer=tokenizer,
        train_dataset=ListTrees(trees),
        loss=loss,
    )
    assert seen[0] == [0.0, -1.0, 1.0, -1.0, 2.0, -1.0, 3.0, -1.0]
    assert seen[1] == [4.0, -1.0, 5.0, -1.0, 6.0, -1.0, 7.0, -1.0]


MISTAKES = {
    "nothing": ([], {}, "missing: model_name_or_path .*; dataset_name"),
    "no rows": (["model"], {}, "missing: dataset_name"),
    "a mapping": (["model"], {"train_dataset": {"prompt": "a"}}, "got dict; wanted"),
    "an empty list": (["model"], {"train_dataset": []}, "list of 0 rows; wanted"),
    "other columns": (["model"], {"train_dataset": [{"a": 1}]}, "the rows .train.: .*'a'"),
    "no model": (["rows"], {"model": nn.Linear(2, 2)}, "model: got a Linear; wanted a causal"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_python_gives_wrongly_is_one_line(workspace, tmp_path, model, tokenizer, case):
    right, wrong, expected = MISTAKES[case]
    rows = read_rows(workspace / "train.jsonl")
    known = {"model": {"model": model}, "rows": {"train_dataset": rows}}
    given = {key: value for name in right for key, value in known[name].items()} | wrong
    with pytest.raises(FasttrError, match=expected) as raised:
        train(config(workspace, tmp_path / "out"), tokenizer=tokenizer, **given)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_model_in_half_precision_is_refused(workspace, tmp_path, model, tokenizer):
    rows = read_rows(workspace / "train.jsonl")
    wanted = r"model: got weights in bfloat16; wanted float32: call model.float\(\)"
    with pytest.raises(FasttrError, match=wanted):
        train(
            config(workspace, tmp_path / "out"),
            model=model.bfloat16(),
            tokenizer=tokenizer,
            train_dataset=rows,
        )


def test_every_named_loss_is_a_loss_as_it_is():
    for cls in LOSSES.values():
        loss = cls()
        assert as_loss(loss) is loss
