"""A run that Python drives: objects in place of names give the run that the names give."""

import json

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr import Callback, TrainConfig, train
from fasttr.data.in_memory import ListTrees
from fasttr.data.load import DataConfig, load_trees
from fasttr.errors import FasttrError
from fasttr.losses import LOSSES, LossInputs, as_loss
from tests.runs import (
    Asks,
    assert_same_run,
    checkpoint_names,
    evaluations,
    read_rows,
    run,
    same_weights,
    settings,
    steps,
    timeless,
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


class Diary(Callback):
    """Writes down what it was called for."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, run):
        self.calls.append(("begin", run.step))

    def on_window(self, run, window):
        assert not run.window_logps.lacks(run.plan.rows(window.start))
        self.calls.append(("window", window))

    def on_step(self, run, metrics):
        self.calls.append(("step", run.step))
        assert metrics.read()["loss"] > 0

    def on_evaluate(self, run, metrics):
        self.calls.append(("evaluate", metrics["eval_loss"]))

    def on_move(self, run):
        self.calls.append(("move", run.reference.updates))

    def on_save(self, run, folder):
        assert (folder / "fasttr" / "state.json").is_file()
        self.calls.append(("save", folder.name))

    def on_train_end(self, run):
        self.calls.append(("end", (run.output_dir / "model.safetensors").is_file()))


def test_callbacks_are_called_in_the_order_of_the_loop(workspace, tmp_path):
    diary = Diary()
    values = settings(
        workspace,
        tmp_path,
        max_steps=3,
        ref_update="hard",
        ref_update_every=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    train(TrainConfig(**values), callbacks=[diary])
    losses = [line["eval_loss"] for line in evaluations(tmp_path)]
    assert diary.calls == [
        ("begin", 0),
        ("window", range(0, 2)),
        ("step", 1),
        ("step", 2),
        ("evaluate", losses[0]),
        ("move", 1),
        ("save", "checkpoint-2"),
        ("window", range(2, 3)),
        ("step", 3),
        ("evaluate", losses[1]),
        ("save", "checkpoint-3"),
        ("end", True),
    ]


def test_what_a_callback_asks_for_is_done_after_the_step(workspace, tmp_path):
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    run(workspace, plain)
    values = settings(workspace, asked)
    result = train(TrainConfig(**values), callbacks=[Asks("save", 2), Asks("stop", 4)])
    assert result.steps == 4
    assert checkpoint_names(asked) == ["checkpoint-2"]
    assert list(map(timeless, steps(asked))) == list(map(timeless, steps(plain)[:4]))


def test_a_request_that_does_not_exist_is_refused(workspace, tmp_path):
    values = settings(workspace, tmp_path)
    with pytest.raises(ValueError, match="ask: got 'rest'; wanted one of stop, save, evaluate"):
        train(TrainConfig(**values), callbacks=[Asks("rest", 1)])


@pytest.mark.parametrize("ref_update", ["soft", "hard"])
def test_an_evaluation_that_is_asked_for_is_against_the_windows_reference(
    workspace, tmp_path, ref_update
):
    changes = {
        "ref_update": ref_update,
        "ref_update_every": 4,
        "eval_dataset_name": str(workspace / "test.jsonl"),
    }
    run(workspace, tmp_path / "planned", eval_strategy="steps", eval_steps=3, **changes)
    values = settings(workspace, tmp_path / "asked", eval_strategy="steps", eval_steps=6, **changes)
    train(TrainConfig(**values), callbacks=[Asks("evaluate", 3, may_evaluate=True)])
    planned = evaluations(tmp_path / "planned")[0]
    first, second = evaluations(tmp_path / "asked")
    assert first == planned
    assert (first["step"], second["step"]) == (3, 6)


def test_an_evaluation_in_a_window_that_was_scored_without_it_is_refused(workspace, tmp_path):
    values = settings(
        workspace,
        tmp_path,
        ref_update="hard",
        ref_update_every=4,
        eval_strategy="steps",
        eval_steps=6,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    with pytest.raises(FasttrError, match="may_evaluate"):
        train(TrainConfig(**values), callbacks=[Asks("evaluate", 3)])


MISTAKES = {
    "nothing": ([], {}, "missing: model_name_or_path .*; dataset_name"),
    "no rows": (["model"], {}, "missing: dataset_name"),
    "a mapping": (["model"], {"train_dataset": {"prompt": "a"}}, "got dict; wanted"),
    "an empty list": (["model"], {"train_dataset": []}, "list of 0 rows; wanted"),
    "other columns": (["model"], {"train_dataset": [{"a": 1}]}, "the rows .train.: .*'a'"),
    "no model": (["rows"], {"model": nn.Linear(2, 2)}, "model: got architecture None"),
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
