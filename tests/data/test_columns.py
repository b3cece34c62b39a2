"""Columns and rows of other tools, read as what they mean; and rows that mean nothing."""

from __future__ import annotations

import pytest

from fasttr.data.load import DataConfig, encode_rows
from fasttr.errors import FasttrError
from tests.data.rows import CHAT, PAIR, decoded, say


def same_trees(ours, wanted) -> bool:
    return [(t.prompt_ids.tolist(), [c.tolist() for c in t.completions]) for t in ours] == [
        (t.prompt_ids.tolist(), [c.tolist() for c in t.completions]) for t in wanted
    ]


def test_columns_are_renamed(load, tokenizer):
    named = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    row = {named[key]: value for key, value in PAIR.items()}
    trees = load([row | {"chosen": "not this one"}], columns=named)
    assert decoded(tokenizer, trees) == [("The sky is", " blue</s>", " black</s>")]
    with pytest.raises(
        FasttrError, match=r"columns names 'goood', and .*'question', 'good', 'bad'"
    ):
        load([row], columns={"chosen": "goood"})


def test_columns_may_change_places(load, tokenizer):
    trees = load([PAIR], columns={"chosen": "rejected", "rejected": "chosen"})
    assert decoded(tokenizer, trees) == [("The sky is", " black</s>", " blue</s>")]


def test_a_csv_file_is_the_json_file_of_its_rows(load, tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,chosen,rejected\n"The sky is"," blue"," black"\n')
    assert decoded(tokenizer, load(tmp_path / "rows.csv")) == decoded(tokenizer, load([PAIR]))


def test_sharegpts_turns_are_messages(load):
    row = {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    }
    assert same_trees(load([row]), load([CHAT]))


def test_alpacas_instruction_and_input_are_the_prompt(load, tokenizer):
    row = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    assert decoded(tokenizer, load([row])) == [("Add.\n1 2", "3</s>", "4</s>")]
    row = {"instruction": "Say a.", "input": "", "output": "a"}
    trees = load([row], sides=1)
    assert decoded(tokenizer, trees) == [("Say a.", "a</s>")]


def test_labels_may_be_numbers(load):
    rows = [{"prompt": "a", "completion": c, "label": x} for c, x in (("b", 1.0), ("c", 0.0))]
    assert load(rows).labels.tolist() == [True, False]
    with pytest.raises(FasttrError, match=r"row 1 .*label is 0\.5; wanted true or false"):
        load([rows[0], {**rows[1], "label": 0.5}])


def test_a_side_without_messages_is_dropped_and_said(load):
    trees = load([CHAT, {**CHAT, "rejected": []}])
    assert len(trees) == 1
    assert dict(trees.report.dropped) == {"a completion is an empty list of messages": 1}


def test_a_template_that_prints_both_sides_alike_is_named_as_the_reason(tokenizer):
    """One that prints strings alone leaves content that is a list of parts out."""
    kept = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}x{% endfor %}"
    )
    parts = {
        side: [say("assistant", [{"type": "text", "text": side}])]
        for side in ("chosen", "rejected")
    }
    try:
        with pytest.raises(FasttrError, match="1: the chat template prints the same for both side"):
            encode_rows(tokenizer, [{**CHAT, **parts}], DataConfig("rows"))
    finally:
        tokenizer.chat_template = kept


def test_identical_sides_stay_where_trls_order_is_wanted(load):
    twin = {**PAIR, "rejected": PAIR["chosen"]}
    assert len(load([PAIR, twin])) == 1
    trees = load([PAIR, twin], drops_identical=False)
    assert len(trees) == 2
    assert "kept 1 pairs whose sides are the same tokens" in str(trees.report)


def test_pairs_that_are_taken_apart_lose_a_side_alone(load, tokenizer):
    """In TRL's order, all chosen sides first; the pair's other side stays."""
    long = {**PAIR, "rejected": " black and more"}
    trees = load([long, PAIR], takes_pairs_apart=True, max_length=17)
    assert trees.labels.tolist() == [True, True, False, False]
    assert [text for _, text in decoded(tokenizer, trees)] == [
        " blue</s>",
        " blue</s>",
        " black ",
        " black</s>",
    ]
    assert trees.positions.tolist() == [0, 1, 0, 1]
    assert "read 2 pairs of" in str(trees.report)


def test_a_role_that_templates_do_not_know_is_said_once(load):
    trees = load([CHAT, {**CHAT, "chosen": [say("bot", "b")]}])
    assert "1 rows have a message of an unknown role (row 1: 'bot')" in str(trees.report)
    assert "unknown role" not in str(load([CHAT]).report)
