"""The mixture of data sets: TRL's rules, held against TRL's own `get_dataset`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import concatenate_datasets, load_dataset
from trl import DatasetMixtureConfig, get_dataset

from fasttr import TrainConfig, train
from fasttr.cli.train import parse_train
from fasttr.config.trl import translate
from fasttr.data.mixture import (
    kept_rows,
    parse_handbook,
    parse_parts,
    read_handbook,
    read_mixture,
)
from fasttr.errors import FasttrError
from tests.runs import lines, run, settings, steps
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for name, rows in (("a", 7), ("b", 5), ("c", 12)):
        write_pairs(folder / f"{name}.jsonl", rows, seed=len(name) + rows)
    write_pairs(folder / "weighted.jsonl", 6, seed=9, weights=True)
    for split, rows in (("train", 8), ("test", 3)):
        (folder / "splits" / "inner").mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "splits" / "inner" / f"{split}.jsonl", rows, seed=rows)
    return folder


def file(folder: Path, name: str, **more) -> dict:
    """A part in the form that TRL takes too."""
    return {"path": "json", "data_files": str(folder / f"{name}.jsonl"), **more}


CASES = {
    "concatenated in order": lambda f: [file(f, "c"), file(f, "a"), file(f, "b")],
    "a part twice": lambda f: [file(f, "a"), file(f, "a")],
    "columns select": lambda f: [
        file(f, "weighted", columns=["prompt", "chosen", "rejected"]),
        file(f, "a"),
    ],
    "columns that one part lacks are null": lambda f: [file(f, "weighted"), file(f, "a")],
    "fractions normalised": lambda f: [
        file(f, "a", fraction=2),
        file(f, "b", fraction=2),
        file(f, "c", fraction=4),
    ],
    "fractions, the scarcest part caps": lambda f: [
        file(f, "a", fraction=0.1),
        file(f, "b", fraction=0.9),
    ],
    "a fraction of 0": lambda f: [file(f, "a", fraction=0), file(f, "b", fraction=0.3)],
    "rounding": lambda f: [
        file(f, "a", fraction=1 / 3),
        file(f, "b", fraction=1 / 7),
        file(f, "c", fraction=0.5),
    ],
    "a split": lambda f: [
        {"path": str(f / "splits"), "data_dir": "inner", "split": "test"},
        file(f, "a"),
    ],
    "a slice": lambda f: [
        {"path": str(f / "splits"), "split": "train[2:5]"},
        file(f, "a", split="train[:50%]"),
    ],
    "files of a folder": lambda f: [{"path": str(f), "data_files": ["b.jsonl", "a.jsonl"]}],
    "files under splits": lambda f: [
        {
            "path": "json",
            "data_files": {"x": str(f / "a.jsonl"), "y": str(f / "b.jsonl")},
            "split": "y",
        }
    ],
    "a pattern": lambda f: [{"path": "json", "data_files": str(f / "[ab].jsonl")}],
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rows_are_trls(folder, case):
    parts = CASES[case](folder)
    theirs = get_dataset(DatasetMixtureConfig(datasets=[dict(part) for part in parts]))
    ours = read_mixture(parse_parts(parts))
    assert ours.keys() == theirs.keys() == {"train"}
    assert ours["train"].column_names == theirs["train"].column_names
    assert ours["train"].to_list() == theirs["train"].to_list()
    assert len(ours["train"]) > 0


@pytest.mark.parametrize("size", [0.25, 5])
def test_a_test_split_has_trls_size_and_no_row_of_the_other(folder, size):
    parts = [file(folder, "a"), file(folder, "c")]
    theirs = get_dataset(
        DatasetMixtureConfig(datasets=[dict(p) for p in parts], test_split_size=size)
    )
    ours = read_mixture(parse_parts(parts), test_split_size=size, seed=3)
    assert {name: len(rows) for name, rows in ours.items()} == {
        name: len(rows) for name, rows in theirs.items()
    }
    rows = [row["rejected"] for row in read_mixture(parse_parts(parts))["train"]]
    assert sorted([*ours["train"]["rejected"], *ours["test"]["rejected"]]) == sorted(rows)


def test_two_processes_draw_the_same_test_rows(folder):
    parts = [file(folder, "c")]
    code = (
        "import json, sys; from fasttr.data.mixture import *; "
        "print(json.dumps(read_mixture(parse_parts(json.loads(sys.argv[1])), test_split_size=0.5, "
        "seed=7)"
        "['test']['rejected'][:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(parts)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    here = read_mixture(parse_parts(parts), test_split_size=0.5, seed=7)["test"]["rejected"][:]
    assert json.loads(done.stdout) == here
    assert (
        read_mixture(parse_parts(parts), test_split_size=0.5, seed=8)["test"]["rejected"][:] != here
    )


def test_nothing_is_oversampled():
    for lengths, fractions in (
        ([7, 5, 12], [1, 2, 3]),
        ([1, 1000], [0.999, 0.001]),
        ([3, 3], [0, 1]),
    ):
        assert all(
            kept <= length
            for kept, length in zip(kept_rows(lengths, fractions), lengths, strict=True)
        )
    assert kept_rows([7, 5, 12], [2, 2, 4]) == [5, 5, 10]


@pytest.mark.parametrize(
    ("datasets", "expected"),
    [
        ([], "wanted a list"),
        ("a.jsonl", "wanted a list"),
        (["a.jsonl"], r"datasets\[0\]: got 'a.jsonl'"),
        ([{"name": "x"}], r"datasets\[0\]: has no path"),
        ([{"path": "a", "fracton": 1}], r"datasets\[0\]: unknown key 'fracton'"),
        ([{"path": "a", "fraction": 0.5}, {"path": "b"}], r"datasets\[1\]: has no fraction"),
        ([{"path": "a", "fraction": 0}], "add up to 0"),
        ([{"path": "a", "fraction": 1e308}, {"path": "b", "fraction": 1e308}], "add up to inf"),
        ([{"path": "a", "fraction": float("nan")}], "wanted a number from 0"),
        ([{"path": "a", "fraction": -1}], "wanted a number from 0"),
        ([{"path": "a", "columns": "prompt"}], "wanted a list of column names"),
        ([{"path": "a", "data_files": {"train": 3}}], "data_files is"),
        ([{"path": None}], "path is None"),
    ],
)
def test_a_wrong_mixture_is_one_line(datasets, expected):
    with pytest.raises(FasttrError, match=expected) as raised:
        parse_parts(datasets)
    assert "\n" not in str(raised.value)


def test_parts_that_cannot_be_read_or_joined_are_one_line(folder, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": ["a"], "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')

    def error(*parts, **more) -> str:
        with pytest.raises(FasttrError) as raised:
            read_mixture(parse_parts(list(parts)), **more)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "do not fit together" in error(file(folder, "a"), file(tmp_path, "other"))
    assert "line 2" in error(file(tmp_path, "broken"))
    assert "nowhere.jsonl does not exist" in error(file(tmp_path, "nowhere"))
    assert "no column 'score'" in error(file(folder, "a", columns=["prompt", "score"]))
    assert "no split 'test'" in error(file(folder, "a", split="test"))
    assert "leaves nothing" in error(file(folder, "a"), test_split_size=7)
    assert "is a file" in error({"path": str(folder / "a.jsonl"), "data_dir": "x"})
    assert "wanted JSON" in error({"path": "text", "data_files": str(folder / "a.jsonl")})


def test_a_run_trains_on_a_mixture_and_evaluates_on_its_test_split(
    workspace, folder, tmp_path, capsys
):
    parts = [{"path": str(folder / "a.jsonl")}, file(folder, "c")]
    run(
        workspace,
        tmp_path,
        dataset_name="ignored",
        datasets=parts,
        test_split_size=4,
        eval_strategy="steps",
        eval_steps=3,
    )
    said = capsys.readouterr().out
    assert "read 15 rows of datasets (train), kept 15" in said
    assert "read 4 rows of datasets (test), kept 4" in said
    assert len(steps(tmp_path)) == 6


def test_trls_yaml_of_a_mixture_is_read(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: m\ndatasets:\n  - path: a\n    split: train\n    fraction: 0.3\n  - "
        "path: b\n"
        "    columns: [prompt, chosen, rejected]\n    fraction: 0.7\ntest_split_size: "
        "0.1\neval_strategy: steps\n"
    )
    config = parse_train(["--config", str(tmp_path / "run.yaml")])
    assert [part["path"] for part in config.datasets] == ["a", "b"]
    assert config.test_split_size == 0.1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"test_split_size": 0.1, "dataset_test_split": "train"},
            "dataset_test_split: got 'train'",
        ),
        ({"datasets": [{"path": "a"}], "test_split_size": 1.5}, "test_split_size: got 1.5"),
        ({"datasets": [{"path": "a"}], "test_split_size": 0}, "test_split_size: got 0"),
        ({"datasets": [{"path": "a"}], "eval_strategy": "steps"}, "no test split of its own"),
        ({"datasets": [{"path": "a"}], "dataset_train_split": "validation"}, "dataset_train_split"),
        ({"datasets": [{"pat": "a"}]}, "unknown key 'pat'"),
    ],
)
def test_settings_that_a_mixture_contradicts(workspace, tmp_path, changes, expected):
    with pytest.raises(FasttrError, match=expected):
        TrainConfig(**settings(workspace, tmp_path, **changes))


def handbook_part(folder: Path, name: str, **more) -> dict:
    return {"id": str(folder / f"{name}.jsonl"), **more}


def prompts_of(rows) -> list[str]:
    return [row["prompt"] for row in rows]


def test_the_rows_of_a_handbook_mixture_are_alignment_handbooks(folder):
    """Each part shuffled and cut to its weight, the whole shuffled, the test rows drawn from it."""
    parts = [
        handbook_part(folder, "c", weight=0.5, columns=["prompt", "chosen", "rejected"]),
        handbook_part(folder, "a"),
    ]
    mixture = parse_handbook({"datasets": parts, "seed": 3, "test_split_size": 4})
    found = read_handbook(mixture)
    c, a = (
        load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train")
        for name in ("c", "a")
    )
    kept = [c.shuffle(seed=3).select(range(6)), a.shuffle(seed=3).select(range(7))]
    wanted = concatenate_datasets(kept).shuffle(seed=3).train_test_split(test_size=4, seed=3)
    assert len(wanted["train"]) == 9
    for split in ("train", "test"):
        assert prompts_of(found[split]) == prompts_of(wanted[split])


def test_the_older_mixer_keeps_first_rows_and_has_test_splits(folder):
    values, _ = translate(
        {
            "dataset_mixer": {str(folder / "splits" / "inner"): 0.5},
            "dataset_splits": ["train", "test"],
        }
    )
    found = read_handbook(parse_handbook(values["dataset_mixture"]))
    train, test = (
        load_dataset(
            "json", data_files=str(folder / "splits" / "inner" / f"{split}.jsonl"), split="train"
        )
        for split in ("train", "test")
    )
    assert prompts_of(found["train"]) == prompts_of(train.select(range(4)).shuffle(seed=42))
    assert prompts_of(found["test"]) == prompts_of(test.shuffle(seed=42))


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [
        ("text", "dataset_mixture: got 'text'; wanted a mapping with datasets"),
        ({"datasets": []}, "dataset_mixture: datasets is empty"),
        ({"datasets": [{"id": "a"}], "sead": 1}, "dataset_mixture: unknown key 'sead'; wanted"),
        ({"datasets": [{"id": "a"}], "seed": -1}, "seed is -1; wanted a whole number from 0"),
        ({"datasets": [{"path": "a"}]}, r"dataset_mixture.datasets\[0\]: unknown key 'path'"),
        ({"datasets": [{"id": "a"}], "test_split_size": 0}, "test_split_size is 0; wanted a share"),
        ({"datasets": [{"id": "a", "weight": -1}]}, "weight is -1; wanted a number from 0"),
    ],
)
def test_a_wrong_handbook_mixture_is_one_line(mixture, expected):
    with pytest.raises(FasttrError, match=expected):
        parse_handbook(mixture)


def test_a_weight_above_1_would_use_rows_twice_and_is_refused(folder):
    mixture = parse_handbook({"datasets": [handbook_part(folder, "a", weight=2.0)]})
    with pytest.raises(FasttrError, match="weight is 2; wanted a share from 0 to 1"):
        read_handbook(mixture)


def test_test_rows_of_one_data_set_are_drawn_from_it(folder, workspace, tmp_path):
    """As those of a mixture of that one; the split that is named is the one that is parted."""
    values = settings(workspace, tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2)
    values |= {"dataset_name": str(folder / "c.jsonl"), "test_split_size": 5, "seed": 8}
    train(TrainConfig(**values))
    evaluated = [line for line in lines(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2]
    own = {name: values[name] for name in ("test_split_size", "seed")}
    parts = parse_parts([file(folder, "c")])
    assert len(read_mixture(parts, **own)["test"]) == 5
