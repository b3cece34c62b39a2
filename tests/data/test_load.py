"""Rows to trees: what is read of each format, what is dropped, and what a report says."""

from __future__ import annotations

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fasttr import console
from fasttr.data.load import DataConfig, encode_rows
from fasttr.errors import FasttrError
from tests.data.rows import CHAT, OTHER, PAIR, decoded, say
from tests.places import SHARED

IMAGE = {"type": "image", "text": None}


def test_hh_transcripts_split_at_the_last_assistant_turn(load, tokenizer):
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    rows = [
        {"chosen": start + " because", "rejected": start + " be quiet"},
        {"chosen": start + " x", "rejected": start.replace("hello", "oh") + " y"},
        {"chosen": "no turn", "rejected": "none"},
        {"chosen": start + " same", "rejected": start + " same"},
    ]
    trees = load(rows, dataset_format="hh_rlhf")
    assert decoded(tokenizer, trees) == [(start, " because</s>", " be quiet</s>")]
    assert trees.report.dropped == {
        "chosen is identical to rejected": 1,
        "chosen and rejected have different prompts": 1,
        "no '\\n\\nAssistant:' in the transcript": 1,
    }
    implicit = load(rows[:1])  # without the format: the common characters
    assert decoded(tokenizer, implicit) == [(start + " be", "cause</s>", " quiet</s>")]


def test_shared_hh_data_is_read(load):
    if not (SHARED / "hh-rlhf").is_dir():
        pytest.skip("the shared data is not here")
    trees = load(SHARED / "hh-rlhf", split="test", dataset_format="hh_rlhf", max_length=4096)
    assert trees.report.rows == 200
    assert len(trees) > 190


def test_a_string_prompt_with_message_completions(load, tokenizer):
    ask, blue, red = say("user", "sky?"), say("assistant", "blue"), say("assistant", "red")
    wanted = [("<user>sky?\n<assistant>", "blue\n", "red\n")]
    assert (
        decoded(
            tokenizer, load([{"prompt": "sky?", "chosen": [ask, blue], "rejected": [ask, red]}])
        )
        == wanted
    )
    assert (
        decoded(tokenizer, load([{"prompt": "sky?", "chosen": [blue], "rejected": [red]}]))
        == wanted
    )
    unpaired = load([{"prompt": "sky?", "completion": [ask, blue], "label": True}])
    assert decoded(tokenizer, unpaired) == [wanted[0][:2]]


def test_tokenised_rows(load, tokenizer):
    row = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}
    trees = load([row, {**row, "rejected_ids": [3, 4, 5]}], max_length=4)
    assert trees[0].prompt_ids.tolist() == [1, 2]
    assert [ids.tolist() for ids in trees[0].completions] == [[3, 4], [6]]
    assert (trees.report.truncated, trees.report.kept) == (1, 1)
    trees = load([{"prompt_ids": [], "completion_ids": [3], "label": False}])
    assert trees.labels.tolist() == [False]
    with pytest.raises(FasttrError, match=r"row 0 .*: rejected_ids holds ids outside \[0, \d+\)"):
        load([{**row, "rejected_ids": [99999]}])
    with pytest.raises(
        FasttrError, match=r"row 0 .*: prompt_ids is null; wanted a list of token ids"
    ):
        load([{**row, "prompt_ids": None}, row])


def test_one_side_keeps_chosen_with_the_boundary_of_both(load, tokenizer):
    merges = datasets.Dataset.from_list([PAIR, {**PAIR, "rejected": " blue"}])
    one = encode_rows(tokenizer, merges, DataConfig("rows", sides=1))
    assert one.completion_lengths.shape == (2, 1)
    assert decoded(tokenizer, one)[0] == ("The sky is", " blue</s>")
    assert len(load([{"prompt": "a", "completion": "b"}], sides=1)) == 1


def test_a_formatted_data_set_of_ones_own_is_read_as_plain_rows(tokenizer):
    rows = datasets.Dataset.from_list([PAIR, OTHER, {**OTHER, "chosen": " new"}])
    mine = datasets.concatenate_datasets([rows.select([2]), rows.select([0])]).with_format("torch")
    trees = encode_rows(tokenizer, mine, DataConfig("mine"))
    assert [tokenizer.decode(tree.completions[0]) for tree in trees] == [" new</s>", " blue</s>"]


def test_weights_and_labels(load):
    weights = [2, 0.5, None, float("inf"), 1e300]
    rows = [{**PAIR, "w": weight} for weight in weights]
    trees = load(rows, weight_column="w")
    assert trees.weights.tolist() == [2.0, 0.5]
    assert trees[1].weight == 0.5
    assert trees.report.dropped == {"the weight is not finite": 3}
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (1, 0, 1)]
    assert load(rows).labels.tolist() == [True, False, True]


def test_rows_are_renumbered_after_dropping_and_the_report_counts(load, tokenizer):
    rows = [
        {**PAIR, "prompt": "p" * 20},
        PAIR,
        {**PAIR, "rejected": " blue"},
        {"prompt": "p" * 19, "chosen": "cccc", "rejected": "dddd"},
    ]
    trees = load(rows, max_length=20)
    assert [tree.row for tree in trees] == [0, 1]
    assert decoded(tokenizer, trees) == [
        ("The sky is", " blue</s>", " black</s>"),
        ("p" * 19, "c", "d"),
    ]
    assert trees.report.dropped == {
        "the prompt alone fills max_length": 1,
        "chosen is identical to rejected": 1,
    }
    assert trees.report.truncated == 1
    text = str(trees.report)
    assert "read 4 rows" in text
    assert "kept 2" in text
    assert "dropped 1: the prompt alone fills max_length" in text
    assert "cut 1 at max_length 20" in text
    assert "boundary" not in text


ROW_ERRORS = {
    "null": (
        [PAIR, {**PAIR, "chosen": None}],
        r"row 1 .*: chosen is null; wanted text or a list of messages",
    ),
    "null prompt": ([PAIR, {**PAIR, "prompt": None}], r"row 1 .*: prompt is null"),
    "number": ([{**PAIR, "chosen": 3}], r"row 0 .*: chosen is 3; wanted text"),
    "no role": (
        [{**CHAT, "prompt": [{"content": "a"}]}],
        r"row 0 .*: prompt is a list with {'content': 'a'}; wanted messages",
    ),
    "no messages": ([CHAT, {**CHAT, "prompt": []}], r"row 1 .*: prompt is an empty list"),
    "no common turn": (
        [{k: CHAT[k] for k in ("chosen", "rejected")}],
        r"row 0 .*: the prompt has no messages",
    ),
    "text completion": (
        [{**CHAT, "chosen": "b", "rejected": "c"}],
        r"row 0 .*: prompt is a list of messages but",
    ),
    "two types": (
        [{**CHAT, "rejected": "c"}],
        r"row 0 .*: chosen and rejected are of different types",
    ),
    "image": (
        [{**CHAT, "prompt": [say("user", [IMAGE])]}],
        r"row 0 .*: prompt holds content that is not text",
    ),
    "images": ([{**PAIR, "images": []}], "has a column 'images': fasttr trains on text alone"),
    "columns": (
        [{"prompt": "a", "better": "b"}],
        "has the columns 'prompt', 'better'; wanted 'chosen', 'rejected'",
    ),
    "label column": ([{"prompt": "a", "completion": "b"}], "a completion alone needs a 'label'"),
    "label": (
        [{"prompt": "a", "completion": "b", "label": "yes"}],
        r"row 0 .*: label is 'yes'; wanted true or false",
    ),
    "tools": ([{**CHAT, "tools": "[{"}], r"row 0 .*: tools is text that is not JSON"),
    "template": (
        [{**CHAT, "chat_template_kwargs": {"truncation": True}}],
        r"row 0 .*: chat_template_kwargs holds trunc",
    ),
    "all dropped": (
        [{**PAIR, "chosen": "x", "rejected": "x"}],
        r"none of 1 rows can be trained on \(1: chosen is ide",
    ),
}


@pytest.mark.parametrize("case", ROW_ERRORS)
def test_a_wrong_row_is_one_line(load, case):
    rows, message = ROW_ERRORS[case]
    with pytest.raises(FasttrError, match=message) as caught:
        load(rows)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is FasttrError


def test_options_that_do_not_fit_the_data(load):
    with pytest.raises(
        FasttrError,
        match="weight_column 'w' is not among the columns 'prompt', 'chosen', 'rejected'",
    ):
        load([PAIR], weight_column="w")
    with pytest.raises(FasttrError, match=r"row 0 .*: w is text; wanted a number"):
        load([{**PAIR, "w": "much"}], weight_column="w")
    with pytest.raises(FasttrError, match="hh_rlhf reads the columns 'chosen', 'rejected'"):
        load([{"prompt": "a", "completion": "b", "label": True}], dataset_format="hh_rlhf")
    with pytest.raises(
        FasttrError, match=r"row 0 .*: chosen is a list of dict; dataset_format hh_rlhf wants"
    ):
        load([CHAT], dataset_format="hh_rlhf")
    half = [PAIR, {**PAIR, "chosen": "x", "rejected": "x"}]
    assert len(load(half, max_dropped_fraction=0.5)) == 1
    with pytest.raises(FasttrError, match=r"1 of 2 rows dropped .*above max_dropped_fraction 0.4"):
        load(half, max_dropped_fraction=0.4)


def test_boundary_mismatches_can_be_fatal(tokenizer):
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template + "{% if add_generation_prompt %}<think>{% endif %}"
        rows = datasets.Dataset.from_list([CHAT, CHAT])
        trees = encode_rows(tokenizer, rows, DataConfig("rows", max_boundary_mismatch=1.0))
        assert trees.report.boundary_mismatches == 2
        assert r"boundary: in 2 (100.0%)" in str(trees.report)
        with pytest.raises(
            FasttrError,
            match=r"in 2 of 2 rows the prompt's tokens .*above max_boundary_mismatch 0.5",
        ):
            encode_rows(tokenizer, rows, DataConfig("rows", max_boundary_mismatch=0.5))
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": " "}, "the name of the data set is empty"),
        ({"max_length": 1}, "max_length is 1; wanted at least 2"),
        ({"sides": 3}, "sides is 3"),
        ({"num_proc": 0}, "num_proc is 0"),
        ({"max_dropped_fraction": 1.5}, "max_dropped_fraction is 1.5"),
        ({"max_boundary_mismatch": -0.1}, "max_boundary_mismatch is -0.1"),
        ({"dataset_format": "hh"}, "dataset_format 'hh' is unknown: use hh_rlhf"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(FasttrError, match=message):
        DataConfig(**{"name": "data.jsonl", **options})


def test_a_tokenizer_without_eos(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(FasttrError, match="has no EOS token"):
        encode_rows(bare, datasets.Dataset.from_list([PAIR]), DataConfig("rows"))


def test_a_column_of_the_format_is_no_weight(load):
    with pytest.raises(
        FasttrError, match="weight_column 'chosen' is a column of the rows' own content"
    ):
        load([PAIR, OTHER], weight_column="chosen")


def test_tokenising_says_how_far_it_is_where_no_bar_is_drawn(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(console, "FIRST_LINE", 0.0)
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: True)
    rows = datasets.Dataset.from_list([PAIR] * 1500)
    encode_rows(tokenizer, rows, DataConfig("rows"))
    assert "Tokenizing rows (train): 1,000 of 1,500 rows, " in capsys.readouterr().out
