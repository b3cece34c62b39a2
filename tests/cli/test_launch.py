"""Several processes of one command: by fasttr itself, by torchrun, and what is refused."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trl
import yaml

from fasttr.cli.launch import needs_launch
from fasttr.config.trl import translate
from fasttr.distributed.launchers import of_environment
from fasttr.distributed.ranks import Ranks
from fasttr.errors import FasttrError
from tests.runs import run, steps

ROOT = Path(__file__).parents[2]


ALONE = {"PYTHONPATH": ".:kernels", "PATH": "/usr/bin:/bin"}
CHANGES = {"max_steps": 3, "train_batch_size": 8, "max_tokens_per_batch": 100}


def test_the_command_starts_its_processes_and_they_give_the_run_of_one(workspace, tmp_path):
    """`num_processes` becomes torchrun, so that this is its path too."""
    run(workspace, tmp_path / "one", **CHANGES)
    words = flags(workspace, tmp_path / "two")
    done = started(tmp_path, "fasttr", "train", *words, "--num_processes", "2")
    assert done.stdout.count("precompute_ref_log_probs: ignored") == 1
    assert done.stdout.count("done: 3 steps") == 1
    assert_same_steps(tmp_path)


@pytest.mark.slow
def test_accelerate_itself_starts_processes_with_the_file_that_trl_ships(workspace, tmp_path):
    run(workspace, tmp_path / "one", **CHANGES)
    file = Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml"
    launcher = ["--config_file", str(file), "--num_processes", "2", "--main_process_port", "0"]
    words = ["-m", "fasttr", "dpo", *flags(workspace, tmp_path / "two")]
    done = started(tmp_path, "accelerate.commands.launch", *launcher, *words)
    assert done.stdout.count("weights: divided among 2 processes, 1 copy in all") == 1
    assert_same_steps(tmp_path)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_the_run(workspace, tmp_path):
    out = tmp_path / "out"
    words = [*flags(workspace, out, max_steps=5000), "--num_processes", "2"]
    begun = subprocess.Popen(
        [sys.executable, "-m", "fasttr", "train", *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ALONE | {"HOME": str(tmp_path)},
    )
    for line in begun.stdout:
        if line.startswith("step 3/5000 "):
            break
    begun.send_signal(signal.SIGTERM)
    rest, _ = begun.communicate(timeout=60)
    assert begun.returncode == 128 + signal.SIGTERM
    (saved,) = out.glob("checkpoint-*")
    assert f"saved {saved}" in rest


def flags(workspace, output_dir, **changes):
    values = {
        "model_name_or_path": workspace / "model",
        "dataset_name": workspace / "train.jsonl",
        "output_dir": output_dir,
        "learning_rate": 3e-3,
        "max_length": 64,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "bf16": "false",
        "precompute_ref_log_probs": "true",
        **CHANGES,
        **changes,
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def started(home, *module_and_words, status=0):
    done = subprocess.run(
        [sys.executable, "-m", *module_and_words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=ALONE | {"HOME": str(home)},
    )
    assert done.returncode == status, done.stderr
    return done


def assert_same_steps(folder):
    for expected, got in zip(steps(folder / "one"), steps(folder / "two"), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_a_mistake_of_several_processes_is_one_line_too(tmp_path):
    words = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path)]
    flags = ["--num_processes", "2", "--shard_size", "3", "--use_cpu"]
    done = started(tmp_path, "fasttr", "dpo", *words, *flags, status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("fasttr: error: shard_size: got 3 with 2 processes; wanted")


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


FULL = {"shard_size": 0}
ONCE = {"shard_size": 0, "reshard_after_forward": False}


def written(folder, content):
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("single_gpu", {}),
        ("multi_gpu", {"num_processes": 8}),
        ("fsdp1", {**FULL, "num_processes": 8}),
        ("fsdp2", {**FULL, "num_processes": 8}),
        ("zero1", {**ONCE, "num_processes": 8}),
        ("zero2", {**ONCE, "num_processes": 8}),
        ("zero3", {**FULL, "num_processes": 8}),
    ],
)
def test_trls_plans_and_the_files_they_name_mean_the_same(monkeypatch, plan, expected):
    """As TRL ships them, but for the precision, which the file says too."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert translate({"accelerate_config": plan})[0] == expected
    file = Path(trl.__file__).parent / "accelerate_configs" / f"{plan}.yaml"
    ours, _ = translate({"config_file": str(file)})
    assert ours.pop("bf16") is True
    assert ours == expected
    ours, _ = translate({"accelerate_config": plan, "num_processes": 2, "shard_size": 2})
    assert (ours["num_processes"], ours["shard_size"]) == (2, 2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"fsdp": "full_shard auto_wrap"}, FULL),
        ({"fsdp": ["shard_grad_op"]}, ONCE),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}, ONCE),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": True}}, FULL),
        ({"fsdp": "no_shard"}, {}),
        ({"fsdp_config": {"reshard_after_forward": False}}, {}),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, FULL),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, ONCE),
        ({"use_fsdp": True}, FULL),
    ],
)
def test_sharding_of_other_launchers_becomes_ours(values, expected):
    assert translate(values)[0] == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"accelerate_config": "fsdp3"},
            "accelerate_config: got 'fsdp3'; wanted one of single_gpu",
        ),
        ({"fsdp": "full_shard offload"}, "fsdp_offload_params: got true"),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "fsdp_offload_params: got true"),
        ({"fsdp": "half_shard"}, "fsdp_sharding_strategy: got 'half_shard'"),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}},
            "offload_optimizer_device, offload_param_device",
        ),
        ({"use_deepspeed": True}, "use_deepspeed: got True; write shard_size: 0"),
    ],
)
def test_sharding_that_is_not_done_is_refused_by_name(values, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        translate(values)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"distributed_type": "TPU"}, "got distributed_type TPU"),
        ({"num_machines": 2}, "got num_machines 2"),
        ({"mixed_precision": "fp8"}, "mixed_precision: got 'fp8'; use bf16"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}},
            "fsdp_offload_params: got true",
        ),
    ],
)
def test_what_a_file_of_accelerate_asks_and_is_not_done_is_refused(tmp_path, content, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        translate({"config_file": written(tmp_path, content)})


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, True)),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, (0, True)),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_RESHARD_AFTER_FORWARD": "false",
            },
            (0, False),
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD",
                "LOCAL_WORLD_SIZE": "4",
            },
            (4, True),
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, (0, True)),
    ],
)
def test_what_accelerate_leaves_in_the_environment_is_read(environment, expected):
    assert of_environment(environment) == expected


def test_shards_that_do_not_make_whole_copies_are_refused():
    with pytest.raises(FasttrError, match="shard_size: got 3 with 4 processes"):
        Ranks(0, 4).sharded(3, on_gpu=False)
    assert Ranks().sharded(0, on_gpu=False) == Ranks()
