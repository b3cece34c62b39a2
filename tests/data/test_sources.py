"""Where rows come from: files and folders of every kind, and one line for what cannot be read."""

from __future__ import annotations

import gzip
import json

import datasets
import numpy as np
import pytest

from fasttr.errors import FasttrError
from tests.data.rows import OTHER, PAIR, decoded, write_data


@pytest.mark.parametrize(
    "file", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "UPPER.JSONL"]
)
def test_files_give_the_same_trees(load, tokenizer, tmp_path, file):
    trees = load(write_data(tmp_path / file, [PAIR, OTHER]))
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
    write_data(tmp_path / "set" / "train.jsonl", [PAIR, OTHER])
    write_data(tmp_path / "set" / "test.jsonl.gz", [OTHER])
    assert len(load(tmp_path / "set")) == 2
    test = load(tmp_path / "set", split="test")
    assert len(test) == 1
    assert test.report.split == "test"
    with pytest.raises(FasttrError, match=r"has no split 'validation': it has 'test', 'train'"):
        load(tmp_path / "set", split="validation")
    with pytest.raises(FasttrError, match=r"has no split 'test': it has 'train'"):
        load([PAIR], split="test")


LISTED = (
    "---\nconfigs: [{config_name: default, data_files: [{split: train, path: a.jsonl}]}]\n---\n"
)


@pytest.mark.parametrize("readme", ["", LISTED], ids=["plain", "listed in a README"])
def test_a_changed_file_and_another_folder_of_that_name_are_read_anew(load, tmp_path, readme):
    for folder, answer in [("one", " blue"), ("two", " green"), ("one", " grey, as so often")]:
        data = tmp_path / folder / "data"
        write_data(data / "a.jsonl", [{**PAIR, "chosen": answer}])
        (data / "README.md").write_text(readme)
        assert load(data).completion_lengths[0, 0] == len(answer) + 1


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
        match="there is no file or folder 'nobody/nothing' here, and the hub does not answer",
    ):
        load("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FasttrError, match="is an empty folder"):
        load(tmp_path / "empty")
    with pytest.raises(FasttrError, match="is a file and has no configurations"):
        load(write_data(tmp_path / "a.jsonl", [PAIR]), config="default")
    datasets.Dataset.from_list([PAIR]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(FasttrError, match="was written by save_to_disk"):
        load(tmp_path / "saved")


def test_no_code_and_no_path_of_a_data_set_is_followed(load, tmp_path):
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('ran')")
    with pytest.raises(FasttrError):
        load(script)
    secret = write_data(tmp_path / "secret.jsonl", [PAIR])
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
