"""Text and messages to token ids: the boundary, calls of bounded size, refusals, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fasttr.data.tokens import (
    Example,
    common_prefix_length,
    encode,
    encode_texts,
    split_at_boundary,
    tokenizer_fingerprint,
)
from fasttr.errors import FasttrError
from tests.data.rows import say
from tests.data.tokenizers import CONVERSATIONS, TEMPLATES, TEXTS, make_tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_then_tokenising_equals_the_templates_own_ids(template):
    tokenizer = make_tokenizer(adds_bos=True, template=template)
    for prompt, chosen, _ in CONVERSATIONS:
        (row,) = encode(tokenizer, [Example(0, prompt, (chosen,))])
        wanted = tokenizer.apply_chat_template(prompt + chosen, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        assert [*row.prompt_ids.tolist(), *row.completions[0].tolist()] == wanted


def test_a_tokenizer_with_its_own_template_method_is_asked_for_ids():
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **options):
            assert options["tokenize"]
            return {"input_ids": [len(message["content"]) for message in conversation]}

    base = make_tokenizer()
    own = Own(tokenizer_object=base.backend_tokenizer, eos_token="</s>")
    own.chat_template = "its own"
    (row,) = encode(own, [Example(0, [say("user", "abc")], ([say("assistant", "abcde")],))])
    assert row.prompt_ids.tolist() == [3]
    assert row.completions[0].tolist() == [5]


def test_one_call_and_many_calls_give_the_same_ids(monkeypatch):
    tokenizer = make_tokenizer(adds_bos=True)
    texts = [*TEXTS, "", "a", *TEXTS]
    together = encode_texts(tokenizer, texts, add_special_tokens=True)
    monkeypatch.setattr("fasttr.data.tokens.MAX_CHARACTERS_PER_CALL", 10)
    apart = encode_texts(tokenizer, texts, add_special_tokens=True)
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in apart]
    assert [ids.tolist() for ids in apart] == [tokenizer(text)["input_ids"] for text in texts]


def test_the_boundary_is_the_smaller_of_both_sides():
    prompt, chosen, rejected = (
        np.array(ids, dtype=np.int32) for ids in ([1, 2, 3], [1, 2, 3, 4], [1, 9])
    )
    row = split_at_boundary(prompt, [chosen, rejected])
    assert row.prompt_ids.tolist() == [1]
    assert [ids.tolist() for ids in row.completions] == [[2, 3, 4], [9]]
    assert row.mismatch
    assert not split_at_boundary(prompt, [chosen]).mismatch
    assert common_prefix_length(prompt[:0], chosen) == 0


def test_refusals_are_one_line():
    tokenizer = make_tokenizer()
    chat = Example(7, [say("user", "a")], ([say("assistant", "b")],))
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(
        FasttrError, match=r"^row 7 .*: the chat template of .* refuses .*roles must alternate$"
    ):
        encode(tokenizer, [chat])
    tokenizer.chat_template = None
    with pytest.raises(
        FasttrError, match="has no chat template: use an instruction-tuned model's tokenizer"
    ):
        encode(tokenizer, [chat])
    with pytest.raises(FasttrError, match=r"row 7 .*: chat_template_kwargs holds truncation"):
        encode(make_tokenizer(), [chat._replace(template_kwargs={"truncation": True})])
    tokenizer.eos_token = None
    with pytest.raises(FasttrError, match="has no EOS token"):
        encode(tokenizer, [Example(0, "a", ("b",))])


def test_the_fingerprint_of_a_tokenizer_follows_what_decides_ids():
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(
        ["a", "a b c"], padding=True, truncation=True, max_length=2
    )  # leaves its mark on the backend
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(make_tokenizer()) == before
    assert tokenizer_fingerprint(make_tokenizer(adds_bos=True)) != before
    assert tokenizer_fingerprint(make_tokenizer(vocab_size=300)) != before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before
