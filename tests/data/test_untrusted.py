"""A model folder from a stranger: pickled weights are not read, its code is not run, and broken
files are one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fasttr.errors import FasttrError
from fasttr.models.load import ModelConfig, load_model, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def folder(workspace, tmp_path) -> Path:
    return Path(shutil.copytree(workspace / "model", tmp_path / "model"))


def refused(load, *args, **options) -> str:
    with pytest.raises(FasttrError) as raised:
        load(*args, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_pickled_weights_are_not_read(folder):
    model = load_model(ModelConfig(str(folder))).model
    (folder / "model.safetensors").unlink()
    assert "no safetensors" in refused(load_model, ModelConfig(str(folder)))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert "no safetensors" in refused(load_model, ModelConfig(str(folder)))


def test_code_beside_the_weights_is_not_run_nor_asked_about(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    marks = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (folder / "own.py").write_text(marks + "class C: pass\nclass M: pass\nclass T: pass\n")
    change(
        folder / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    load_model(ModelConfig(str(folder)))
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.T", "own.T"]},
    )
    assert "which is run with trust_remote_code true alone" in refused(load_tokenizer, str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe" * 40, b"[]"], ids=["empty", "torn", "bytes", "list"]
)
def test_a_broken_model_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    assert "model_name_or_path" in refused(load_model, ModelConfig(str(folder)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe" * 40, b"[]"], ids=["empty", "torn", "bytes", "list"]
)
def test_a_broken_tokenizer_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    assert "model_name_or_path" in refused(load_tokenizer, str(folder))


def test_weights_that_do_not_fit_the_config_are_one_line(folder):
    change(folder / "config.json", hidden_size=64)
    assert "model_name_or_path" in refused(load_model, ModelConfig(str(folder)))


def test_weights_that_are_missing_are_not_drawn_at_random(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights (model.norm.weight first)" in refused(
        load_model, ModelConfig(str(folder))
    )
