"""What stops a run before its first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fasttr import TrainConfig, train
from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from fasttr.errors import FasttrError
from fasttr.evaluation.standalone import measure
from fasttr.models.load import load_tokenizer
from tests.runs import error_line, flags, read_rows, run, settings, write_rows

EXTRA = "<extra>"


@pytest.fixture
def larger_tokenizer(workspace, tmp_path) -> Path:
    """The workspace's model of 300 rows with a tokenizer of 301 tokens."""
    folder = Path(shutil.copytree(workspace / "model", tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.add_tokens([EXTRA]) == 1
    assert tokenizer.convert_tokens_to_ids(EXTRA) == 300
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def larger_model(larger_tokenizer, tmp_path) -> Path:
    """The same with an embedding for every token."""
    model = AutoModelForCausalLM.from_pretrained(larger_tokenizer)
    model.resize_token_embeddings(301)
    folder = tmp_path / "larger"
    shutil.copytree(larger_tokenizer, folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def extra_rows(workspace, tmp_path) -> Path:
    """Rows of which one holds the added token."""
    rows = read_rows(workspace / "train.jsonl")
    rows[7]["chosen"] += EXTRA
    return write_rows(tmp_path / "extra.jsonl", rows)


def test_an_id_beyond_the_embedding_in_any_split_stops_a_run(workspace, tmp_path):
    """Trees that Python hands over may hold ids that no tokenizer made; the model has 300 rows."""
    known, beyond = (
        ListTrees([Tree(row, ids(1, 2), (ids(3, last), ids(4))) for row in range(4)])
        for last in (299, 300)
    )
    evaluates = {"eval_strategy": "steps", "eval_steps": 3}
    config = TrainConfig(**settings(workspace, tmp_path, dataset_name=None, **evaluates))
    with pytest.raises(FasttrError, match=r"the rows hold token 300, .* has 300 rows"):
        train(config, train_dataset=known, eval_dataset=beyond)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


WANTED = "the tokenizer knows ids up to 300, and the embedding of .* has 300 rows; .*resize_embed"


def test_a_token_without_an_embedding_stops_the_policy(
    workspace, tmp_path, larger_tokenizer, extra_rows
):
    names = {"model_name_or_path": str(larger_tokenizer), "dataset_name": str(extra_rows)}
    with pytest.raises(FasttrError, match=f"^model_name_or_path: {WANTED}"):
        run(workspace, tmp_path / "out", **names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
@pytest.mark.parametrize("ref_update", ["none", "hard"])
def test_a_reference_with_a_smaller_vocabulary_stops(
    workspace, tmp_path, larger_model, extra_rows, ref_update, loss_type
):
    names = {"model_name_or_path": str(larger_model), "dataset_name": str(extra_rows)}
    smaller = {"ref_model_name_or_path": str(workspace / "reference"), "ref_update": ref_update}
    with pytest.raises(FasttrError, match=f"^ref_model_name_or_path: {WANTED}"):
        run(workspace, tmp_path / "out", loss_type=loss_type, **names, **smaller)


def test_a_given_model_is_held_to_its_rows(workspace, tmp_path, larger_tokenizer, extra_rows):
    model = AutoModelForCausalLM.from_pretrained(larger_tokenizer)
    values = settings(workspace, tmp_path / "out")
    config = TrainConfig(**{**values, "model_name_or_path": None, "dataset_name": None})
    with pytest.raises(FasttrError, match=r"^model: .*the embedding of the given model"):
        train(
            config,
            model=model,
            tokenizer=load_tokenizer(str(larger_tokenizer)),
            train_dataset=read_rows(extra_rows),
        )


def test_what_is_measured_is_held_to_its_rows(
    workspace, larger_tokenizer, larger_model, extra_rows
):
    def measured(model: Path, anchor: Path) -> None:
        names = {"model_name_or_path": str(model), "dataset_name": str(extra_rows)}
        measure(TrainConfig(**names, use_cpu=True, disable_tqdm=True), str(anchor))

    with pytest.raises(FasttrError, match=f"^model_name_or_path: {WANTED}"):
        measured(larger_tokenizer, larger_model)
    with pytest.raises(FasttrError, match=f"^anchor_model_name_or_path: {WANTED}"):
        measured(larger_model, larger_tokenizer)


def test_a_soft_reference_of_another_shape_is_one_line(workspace, tmp_path, capsys):
    config = AutoConfig.from_pretrained(workspace / "model", intermediate_size=192)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "wider")
    values = settings(
        workspace,
        tmp_path / "out",
        ref_update="soft",
        ref_model_name_or_path=tmp_path / "wider",
    )
    message = error_line(capsys, ["train", *flags(values)])
    assert message.startswith("ref_model_name_or_path: got a model whose")
    assert "mlp.down_proj.weight has shape" in message


def test_dropout_that_should_stay_is_refused(workspace, tmp_path, capsys):
    folder = Path(shutil.copytree(workspace / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    values = settings(workspace, tmp_path / "out", model_name_or_path=folder, disable_dropout=False)
    message = error_line(capsys, ["train", *flags(values)])
    assert "disable_dropout: got false and the model has attention_dropout" in message


def stored_otherwise(workspace, folder: Path, change) -> Path:
    """The workspace's model, whose tensors `change` has changed."""
    shutil.copytree(workspace / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("key", ["model_name_or_path", "ref_model_name_or_path"])
def test_weights_that_are_not_there_stop_a_run_before_its_rows(workspace, tmp_path, capsys, key):
    rows = [row | {"chosen": None} for row in read_rows(workspace / "train.jsonl")]
    data = write_rows(tmp_path / "broken.jsonl", rows)
    name = "model.layers.1.mlp.up_proj.weight"

    def shorten(tensors):
        tensors[name] = tensors[name][:8].contiguous()

    lacks = stored_otherwise(workspace, tmp_path / "lacks", lambda tensors: tensors.pop(name))
    shorter = stored_otherwise(workspace, tmp_path / "shorter", shorten)
    parts = Path(shutil.copytree(workspace / "model", tmp_path / "parts"))
    first = "model-00001-of-00002.safetensors"
    (parts / "model.safetensors").rename(parts / first)
    places = {"model.norm.weight": first, name: first.replace("1", "2", 1)}
    index = json.dumps({"metadata": {}, "weight_map": places})
    (parts / "model.safetensors.index.json").write_text(index)
    for folder, told in (
        (lacks, f"lacks 1 weights ({name} first), which would be random"),
        (shorter, f"holds {name} of shape [8, 32], and its config.json means ["),
        (parts, "lacks model-00002-of-00002.safetensors, which its index of weights names"),
    ):
        wrong = {"dataset_name": str(data), key: str(folder)}
        line = error_line(capsys, ["train", *flags(settings(workspace, tmp_path / "out") | wrong)])
        assert line.startswith(f"{key}: {folder} {told}"), line


def test_a_folder_that_cannot_be_written_stops_a_run_before_its_rows(workspace, tmp_path, capsys):
    rows = [row | {"chosen": None} for row in read_rows(workspace / "train.jsonl")]
    data = write_rows(tmp_path / "broken.jsonl", rows)
    changes = {"dataset_name": str(data)}
    values = settings(workspace, data / "out", **changes)
    assert error_line(capsys, ["train", *flags(values)]).startswith("output_dir: cannot write ")
