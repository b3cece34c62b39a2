"""Another chat template, and another end of a completion, than the tokenizer's own."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fasttr.data.tokens import adjust
from fasttr.errors import FasttrError
from fasttr.models.load import ModelConfig, tokenizer_of
from tests.runs import run

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"


def test_a_template_is_text_or_a_file(workspace, tmp_path):
    model = str(workspace / "model")
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": "a"}]
    for given in (TEMPLATE, str(tmp_path / "own.jinja")):
        tokenizer = tokenizer_of(ModelConfig(model, chat_template=given))
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "[user]a|"
    own = tokenizer_of(ModelConfig(model)).apply_chat_template(messages, tokenize=False)
    assert own == AutoTokenizer.from_pretrained(model).apply_chat_template(messages, tokenize=False)
    assert own != "[user]a|"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"chat_template": "plain words"}, "chat_template: got 'plain words', which writes no mes"),
        ({"chat_template": "/nowhere.jinja"}, "chat_template: cannot read '/nowhere.jinja'"),
        ({"eos_token": "<none>"}, "eos_token: got '<none>', which .* does not know"),
    ],
)
def test_what_is_no_template_and_no_token_is_one_line(workspace, given, expected):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    with pytest.raises(FasttrError, match=expected):
        adjust(tokenizer, **{"chat_template": None, "eos_token": None, **given})


def test_a_run_ends_with_the_token_that_it_was_given_and_so_does_its_model(workspace, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    other = "a" if "a" in tokenizer.get_vocab() else next(iter(tokenizer.get_vocab()))
    assert other != tokenizer.eos_token
    out = tmp_path / "out"
    run(workspace, out, eos_token=other, chat_template=TEMPLATE, max_steps=1)
    saved = AutoTokenizer.from_pretrained(out)
    assert (saved.eos_token, saved.chat_template) == (other, TEMPLATE)
    expected = tokenizer.convert_tokens_to_ids(other)
    assert AutoModelForCausalLM.from_pretrained(out).config.eos_token_id == expected
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert ends[0] == expected
    assert json.loads((out / "train_config.json").read_text())["eos_token"] == other
