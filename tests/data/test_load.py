"""Rows of files and folders to trees: formats, what is dropped, the cache, fingerprints, and every
error's one line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fasttr.data.load import DataConfig, TreeSet, encode_rows, load_trees
from fasttr.errors import FasttrError

SHARED = Path(__file__).parents[3] / "shared" / "data"

PAIR = {"prompt": "The sky is", "chosen": " blue", "rejected": " black"}
OTHER = {"prompt": "The sun is", "chosen": " warm", "rejected": " far away"}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that lengths can be counted by hand."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(source, **options) -> TreeSet:
        path = source if isinstance(source, str | Path) else write(tmp_path / "data.jsonl", source)
        return load_trees(
            tokenizer, DataConfig(str(path), cache_dir=str(tmp_path / "cache"), **options)
        )

    return load


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(text)
    return path


def decoded(tokenizer, trees):
    return [
        (tokenizer.decode(tree.prompt_ids), *map(tokenizer.decode, tree.completions))
        for tree in trees
    ]


@pytest.mark.parametrize(
    "file", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "UPPER.JSONL"]
)
def test_files_give_the_same_trees(load, tokenizer, tmp_path, file):
    trees = load(write(tmp_path / file, [PAIR, OTHER]))
    assert decoded(tokenizer, trees) == [
        ("The sky is", " blue</s>", " black</s>"),
        ("The sun is", " warm</s>", " far away</s>"),
    ]
    assert trees.prompt_lengths.tolist() == [10, 10]
    assert trees.completion_lengths.tolist() == [[6, 7], [6, 10]]
    assert (
        trees.completion_lengths.dtype
        == trees.prompt_lengths.dtype
        == trees[0].prompt_ids.dtype
        == np.int32
    )
    assert trees.weights.tolist() == [1.0, 1.0]
    assert trees.weights.dtype == np.float32
    assert trees.labels is None
    assert [tree.row for tree in trees] == [0, 1]
    with pytest.raises(IndexError):
        trees[2]


def test_a_json_array_is_read(load, tokenizer, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIR, OTHER], indent=2))
    assert len(load(path)) == 2


def test_a_folder_has_the_splits_of_its_file_names(load, tokenizer, tmp_path):
    write(tmp_path / "set" / "train.jsonl", [PAIR, OTHER])
    write(tmp_path / "set" / "test.jsonl.gz", [OTHER])
    assert len(load(tmp_path / "set")) == 2
    test = load(tmp_path / "set", split="test")
    assert len(test) == 1
    assert test.report.split == "test"
    with pytest.raises(FasttrError, match=r"has no split 'validation': it has 'test', 'train'"):
        load(tmp_path / "set", split="validation")
    with pytest.raises(FasttrError, match=r"has no split 'test': it has 'train'"):
        load([PAIR], split="test")


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


def say(role, content):
    return {"role": role, "content": content}


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


def test_many_rows_over_several_batches_keep_their_order(load, tokenizer):
    rows = [
        {"prompt": f"{i}:", "chosen": "a" * (i % 7), "rejected": "b" if i % 3 else "a" * (i % 7)}
        for i in range(2500)
    ]
    trees = load(rows)
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    assert len(trees) == len(kept) < 2500
    for i in (0, 1, 998, 999, 1000, 1001, len(kept) - 1):
        assert tokenizer.decode(trees[i].prompt_ids) == kept[i]["prompt"]
        assert tokenizer.decode(trees[i].completions[0]) == kept[i]["chosen"] + "</s>"
    start = time.perf_counter()
    for i in range(len(trees)):
        trees[i]
    assert (time.perf_counter() - start) / len(trees) < 50e-6


def test_processes_do_not_change_the_trees(load, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**PAIR, "prompt": f"{i}:"} for i in range(50)])
    alone = load(path)
    for file in (tmp_path / "cache").rglob("cache-*.arrow"):
        file.unlink()
    together = load(path, num_proc=2)
    assert together.fingerprint == alone.fingerprint
    assert decoded(tokenizer, together) == decoded(tokenizer, alone)


def test_a_second_run_reads_the_cache(load, monkeypatch, tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR, OTHER])
    first = load(path)

    def refuse(self, *_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("fasttr.data.load.Encoder.__call__", refuse)
    second = load(path)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    with pytest.raises(AssertionError, match="tokenised again"):
        load(path, max_length=7)


def test_the_fingerprint_follows_content_and_options_not_places(load, tokenizer, tmp_path):
    rows = [PAIR, OTHER]
    trees = load(write(tmp_path / "a.jsonl", rows))
    assert load(write(tmp_path / "elsewhere" / "b.parquet", rows)).fingerprint == trees.fingerprint
    others = {
        "max_length": load(tmp_path / "a.jsonl", max_length=1000).fingerprint,
        "sides": load(tmp_path / "a.jsonl", sides=1).fingerprint,
        "order": load(rows[::-1]).fingerprint,
        "token": load([PAIR, {**OTHER, "chosen": " warn"}]).fingerprint,
        "boundary": load(
            [PAIR, {"prompt": "The sun is ", "chosen": "warm", "rejected": "far away"}]
        ).fingerprint,
        "weight": load([{**row, "w": 2.0} for row in rows], weight_column="w").fingerprint,
    }
    assert len({trees.fingerprint, *others.values()}) == len(others) + 1


def test_the_fingerprint_is_the_same_in_another_process(load, tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [PAIR, OTHER])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = (
        "import sys; from transformers import AutoTokenizer; from fasttr.data.load import "
        "DataConfig, load_trees\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])\n"
        "print(load_trees(tokenizer, DataConfig(sys.argv[1], cache_dir=sys.argv[3])).fingerprint)"
    )
    arguments = [str(path), str(tmp_path / "tokenizer"), str(tmp_path / "other_cache")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == load(path).fingerprint


def test_importing_reads_neither_transformers_nor_datasets():
    program = (
        "import sys, fasttr.data.load; "
        "assert not {'datasets', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


def test_only_our_own_bar_is_shown(load, capfd):
    datasets.enable_progress_bars()  # a run with disable_tqdm in the same process switches them off
    load([PAIR, OTHER])
    shown = capfd.readouterr().err
    assert "Tokenizing train" in shown
    assert "Generating" not in shown
    assert not datasets.are_progress_bars_disabled()


CHAT = {
    "prompt": [say("user", "a")],
    "chosen": [say("assistant", "b")],
    "rejected": [say("assistant", "c")],
}
IMAGE = {"type": "image", "text": None}

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


def broken_file(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


GOOD = (json.dumps(PAIR) + "\n").encode()
FILE_ERRORS = {
    "middle.jsonl": (GOOD * 3 + b'{"prompt": "a" "chosen"\n' + GOOD, "broken JSON at line 4"),
    "end.jsonl": (GOOD * 2 + GOOD[:20], "broken JSON at line 3"),
    "zipped.jsonl.gz": (GOOD * 5 + b"{]\n", "broken JSON at line 6"),
    "blank.jsonl": (GOOD + b"\n\n" + b"nonsense\n", "broken JSON at line 4"),
    "array.json": (b"[\n" + GOOD.strip() + b",\n{]\n", "broken JSON at line 3"),
    "types.jsonl": (
        GOOD * 2 + b'{"prompt": ["a"], "chosen": "b", "rejected": "c"}\n',
        "row 2 .*: prompt is a list with 'a'; wanted|'prompt' is text at line 1 and a list at line "
        "3",
    ),
    "scalar.jsonl": (b"3\n4\n", "line 1 is not a JSON object"),
    "bytes.jsonl": (GOOD + b'{"prompt": "\xff"}\n', "not UTF-8 text"),
    "empty.jsonl": (b"", "is empty"),
    "empty.jsonl.gz": (b"", "is empty"),
    "only_blank.jsonl": (b"\n\n", "holds no rows"),
    "table.xlsx": (b"PK", "is of an unknown kind: wanted .json, .jsonl"),
    "fake.parquet": (b"not parquet", "cannot be read"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_a_broken_file_is_one_line(load, tmp_path, name):
    content, message = FILE_ERRORS[name]
    path = broken_file(tmp_path / name, content)
    with pytest.raises(FasttrError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_broken_gzip_is_one_line(load, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(FasttrError, match="cannot be read"):
        load(path)
    path.write_bytes(gzip.compress(GOOD * 500)[:-30])
    with pytest.raises(FasttrError, match="cannot be read"):
        load(path)


def test_places_that_hold_no_data(load, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in (
        "missing.jsonl",
        "./missing",
        "/missing/folder",
        "a/b/c",
        "https://example.org/a.jsonl",
    ):
        with pytest.raises(FasttrError, match="does not exist: give a"):
            load(name)
    with pytest.raises(
        FasttrError,
        match=r"there is no file or folder 'nobody/nothing' here, and the hub does not answer",
    ):
        load("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FasttrError, match="is an empty folder"):
        load(tmp_path / "empty")
    with pytest.raises(FasttrError, match="is a file and has no configurations"):
        load(write(tmp_path / "a.jsonl", [PAIR]), config="default")
    datasets.Dataset.from_list([PAIR]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(FasttrError, match="was written by save_to_disk"):
        load(tmp_path / "saved")


def test_no_code_and_no_path_of_a_data_set_is_followed(load, tmp_path):
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FasttrError):
        load(script)
    secret = write(tmp_path / "secret.jsonl", [PAIR])
    for target in (str(secret), "../secret.jsonl"):
        folder = tmp_path / f"set{len(target)}"
        folder.mkdir()
        header = f"---\nconfigs:\n- config_name: default\n  data_files: {target}\n---\n"
        (folder / "README.md").write_text(header)
        with pytest.raises(FasttrError):
            load(folder)
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "chosen": datasets.Image(),
            "rejected": datasets.Value("string"),
        }
    )
    row = {"prompt": ["a"], "chosen": [{"path": str(secret), "bytes": None}], "rejected": ["c"]}
    datasets.Dataset.from_dict(row, features=features).to_parquet(str(tmp_path / "image.parquet"))
    with pytest.raises(FasttrError, match="column 'chosen' is of type Image"):
        load(tmp_path / "image.parquet")


def test_a_full_disk_is_one_line(load, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.DatasetBuilder.download_and_prepare", full)
    with pytest.raises(FasttrError, match=r"No space left.*: free space"):
        load([PAIR])
    monkeypatch.undo()
    monkeypatch.setattr("datasets.Dataset.map", full)
    with pytest.raises(
        FasttrError, match=r"cannot be written to the cache .*No space left.*: free space"
    ):
        load([PAIR])


def test_a_tokenizer_without_eos(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(FasttrError, match="has no EOS token"):
        encode_rows(bare, datasets.Dataset.from_list([PAIR]), DataConfig("rows"))


def test_a_column_of_the_format_is_no_weight(load):
    with pytest.raises(
        FasttrError, match="weight_column 'chosen' is a column of the rows' own content"
    ):
        load([PAIR, OTHER], weight_column="chosen")
