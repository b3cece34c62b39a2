"""Tokens without a row in the embedding, and two models that mean other tokens by one id."""

import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fasttr import TrainConfig, train
from fasttr.errors import FasttrError
from fasttr.models.vocabulary import add_rows, check_rows, check_same_tokens, rows_wanted
from tests.cli.mistakes import smaller_vocabulary
from tests.runs import run, settings, steps, stopped_run


def tokenizer(pad: int | None = None, unknown: int | None = None, added: str = "", **ids: int):
    return types.SimpleNamespace(
        get_vocab=lambda: ids,
        get_added_vocab=lambda: {token: ids[token] for token in added.split()},
        pad_token_id=pad,
        unk_token_id=unknown,
        bos_token_id=None,
        eos_token_id=1,
    )


def hf_config(rows: int):
    text = types.SimpleNamespace(vocab_size=rows)
    return types.SimpleNamespace(get_text_config=lambda: text)


def test_tokens_of_padding_and_of_unknown_text_need_no_row():
    check_rows(hf_config(2), tokenizer(pad=2, a=0, end=1, pad_=2), "model", "m")
    assert rows_wanted(tokenizer(pad=1, a=0, end=1)) == 2
    assert rows_wanted(tokenizer(unknown=2, a=0, end=1, unk=2)) == 2
    assert rows_wanted(tokenizer(pad=0, unknown=1, a=0, end=1)) == 2
    with pytest.raises(FasttrError, match=r"^model: .* ids up to 2, .* of m has 2 rows"):
        check_rows(hf_config(2), tokenizer(pad=1, a=0, end=1, b=2), "model", "m")


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"a": 0, "end": 1, "c": 3}, "'b' is 2 here and absent there"),
        ({"a": 0, "end": 1, "b": 3}, "'b' is 2 here and 3 there"),
        ({"a": 0, "end": 1, "b": 2, "c": 3}, "'c' is absent here and 3 there"),
        ({"a": 0, "end": 1, "b": 2, "new": 2, "added": "new"}, "'new' is absent here and 2 there"),
    ],
)
def test_other_tokens_are_refused(theirs, said):
    with pytest.raises(FasttrError, match=said):
        check_same_tokens(tokenizer(a=0, end=1, b=2), tokenizer(**theirs), "ref", "r")


def test_either_may_have_added_tokens():
    plain, chat = tokenizer(a=0, end=1), tokenizer(a=0, end=1, user=2, added="user")
    check_same_tokens(plain, chat, "ref", "r")
    check_same_tokens(chat, plain, "ref", "r")


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old_ones(workspace, tied):
    config = AutoConfig.from_pretrained(workspace / "model", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    old = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    old = [weight.detach().clone() for weight in old]

    assert add_rows(model, 304)
    assert not add_rows(model, 304)

    new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (new[0] is new[1]) == tied
    for before, after in zip(old, new, strict=True):
        assert torch.equal(after[:300], before)
        torch.testing.assert_close(after[300:], before.mean(0).expand(4, -1))


@pytest.fixture
def cut_model(workspace, tmp_path):
    """The workspace's model with 40 rows for the 300 tokens of its tokenizer."""
    folder = tmp_path / "cut"
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(folder)
    smaller_vocabulary(folder)
    return folder


def test_a_run_adds_rows_trains_them_and_resumes(workspace, tmp_path, cut_model):
    changes = {
        "model_name_or_path": str(cut_model),
        "ref_model_name_or_path": str(cut_model),
        "resize_embeddings": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    run(workspace, tmp_path / "whole", **changes)
    assert steps(tmp_path / "whole")[0]["rewards/margins"] == 0.0
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert len(saved["model.embed_tokens.weight"]) == len(saved["lm_head.weight"]) == 300
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.vocab_size == 300

    stopped_run(workspace, tmp_path / "cut short", 2, **changes)
    run(workspace, tmp_path / "cut short", **changes, resume_from_checkpoint=True)
    resumed = load_file(tmp_path / "cut short" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in saved.items())


def test_an_adapter_cannot_carry_new_rows(workspace, tmp_path):
    with pytest.raises(FasttrError, match=r"^resize_embeddings: got true with use_peft"):
        TrainConfig(**settings(workspace, tmp_path, resize_embeddings=True, use_peft=True))


def test_a_model_in_memory_is_its_owners_to_resize(workspace, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    config = TrainConfig(**settings(workspace, tmp_path / "out", resize_embeddings=True))
    with pytest.raises(FasttrError, match=r"^resize_embeddings: .* in memory"):
        train(config, model=model)
