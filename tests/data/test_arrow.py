"""The encoded columns: their order, their cache, and fingerprints that follow content alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.data.rows import OTHER, PAIR, decoded, write_data


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


def test_processes_do_not_change_the_trees(load, tokenizer, tmp_path):
    path = write_data(tmp_path / "a.jsonl", [{**PAIR, "prompt": f"{i}:"} for i in range(50)])
    alone = load(path)
    for file in (tmp_path / "cache").rglob("cache-*.arrow"):
        file.unlink()
    together = load(path, num_proc=2)
    assert together.fingerprint == alone.fingerprint
    assert decoded(tokenizer, together) == decoded(tokenizer, alone)


def test_a_second_run_reads_the_cache(load, monkeypatch, tmp_path):
    path = write_data(tmp_path / "a.jsonl", [PAIR, OTHER])
    first = load(path)

    def refuse(self, *_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("fasttr.data.encoder.Encoder.__call__", refuse)
    second = load(path)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    with pytest.raises(AssertionError, match="tokenised again"):
        load(path, max_length=7)


def test_the_fingerprint_follows_content_and_options_not_places(load, tokenizer, tmp_path):
    rows = [PAIR, OTHER]
    trees = load(write_data(tmp_path / "a.jsonl", rows))
    assert (
        load(write_data(tmp_path / "elsewhere" / "b.parquet", rows)).fingerprint
        == trees.fingerprint
    )
    others = {
        "max_length": load(tmp_path / "a.jsonl", max_length=1000).fingerprint,
        "sides": load(tmp_path / "a.jsonl", sides=1).fingerprint,
        "order": load(rows[::-1]).fingerprint,
        "token": load([PAIR, {**OTHER, "chosen": " warn"}]).fingerprint,
        "boundary": load(
            [PAIR, {"prompt": "The sun is ", "chosen": "warm", "rejected": "far away"}]
        ).fingerprint,
        "weight": load([{**row, "w": 2.0} for row in rows], weight_column="w").fingerprint,
        "heavier": load([{**row, "w": 3.0} for row in rows], weight_column="w").fingerprint,
    }
    assert len({trees.fingerprint, *others.values()}) == len(others) + 1


def test_the_fingerprint_is_the_same_in_another_process(load, tokenizer, tmp_path):
    path = write_data(tmp_path / "a.jsonl", [PAIR, OTHER])
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
    assert "Tokenizing data.jsonl (train)" in shown
    assert "Generating" not in shown
    assert not datasets.are_progress_bars_disabled()
