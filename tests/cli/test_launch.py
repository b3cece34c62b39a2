"""Several processes of one command: by fasttr itself, by torchrun, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from fasttr.cli.launch import needs_launch
from fasttr.config.trl import translate
from fasttr.errors import FasttrError
from tests.runs import run, steps

ROOT = Path(__file__).parents[2]


def test_the_command_starts_its_processes_and_they_give_the_run_of_one(workspace, tmp_path):
    """`num_processes` becomes torchrun, so that this is its path too."""
    changes = {"max_steps": 3, "train_batch_size": 8, "max_tokens_per_batch": 100}
    run(workspace, tmp_path / "one", **changes)
    flags = {
        "model_name_or_path": workspace / "model",
        "dataset_name": workspace / "train.jsonl",
        "output_dir": tmp_path / "two",
        "learning_rate": 3e-3,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "bf16": "false",
        "num_processes": 2,
        "precompute_ref_log_probs": "true",
        **changes,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "fasttr", "train", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={"PYTHONPATH": ".:kernels", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("precompute_ref_log_probs: ignored") == 1
    assert done.stdout.count("done: 3 steps") == 1
    for expected, got in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_processes_are_started_only_where_no_launcher_has_done_so(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert [needs_launch(number) for number in (None, 1, 2)] == [False, False, True]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [needs_launch(number) for number in (None, 2)] == [False, False]
    with pytest.raises(FasttrError, match="num_processes: got 4 under a launcher that started 2"):
        needs_launch(4)


def test_the_batch_of_a_device_is_that_of_each_process(monkeypatch):
    """TRL's step is rows of a device x accumulation x devices; KTO's estimate is over all devices
    at a time, of completions that each device rotates among its own rows."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    names = ("train_batch_size", "group_size", "mismatch_size")

    def sizes(**values):
        ours, _ = translate({**batch, "train_sampling_strategy": "random", **values})
        return tuple(ours.get(name) for name in names)

    assert sizes() == (8, 4, None)
    assert sizes(num_processes=3) == (24, 4, None)
    assert sizes(num_processes=3, loss_type="kto") == (24, 12, 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sizes(loss_type="kto") == (16, 8, 4)


def test_sharding_of_accelerate_is_refused_by_name():
    assert translate({"accelerate_config": "multi_gpu", "num_processes": 2})[0] == {
        "num_processes": 2
    }
    with pytest.raises(FasttrError, match="accelerate_config: got 'fsdp2'; wanted single_gpu"):
        translate({"accelerate_config": "fsdp2"})
