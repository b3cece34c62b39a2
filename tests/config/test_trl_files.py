"""Files and command lines of TRL keep their meaning: the words `trl dpo` become `fasttr train`,
nothing else."""

import ast
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from fasttr.cli import main
from fasttr.cli.train import parse_train
from fasttr.config.train_config import TrainConfig
from fasttr.config.trl_table import TABLE
from fasttr.errors import FasttrError
from tests.runs import settings, steps

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]

FULL_DPO = """
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
dtype: float32
attn_implementation: sdpa
dataset_name: trl-lib/ultrafeedback_binarized
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
beta: 0.1
max_length: 2048
truncation_mode: keep_start
sync_ref_model: true
ref_model_mixup_alpha: 0.6
ref_model_sync_steps: 64
output_dir: out
num_train_epochs: 1
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
per_device_eval_batch_size: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
learning_rate: 5e-7
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 0.5}
warmup_steps: 0.1
bf16: true
tf32: true
eval_strategy: no
logging_steps: 5
logging_first_step: true
save_strategy: steps
save_steps: 0.25
save_total_limit: none
report_to: [tensorboard]
run_name: qwen-dpo
dataloader_num_workers: 4
seed: 42
num_processes: 1
"""

HANDBOOK = """
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
torch_dtype: null

dataset_name: HuggingFaceH4/ultrafeedback_binarized
dataset_train_split: train_prefs
dataset_test_split: test_prefs
dataset_num_proc: 12

bf16: true
beta: 0.01
do_eval: true
evaluation_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: zephyr-7b-dpo-full
hub_strategy: every_save
learning_rate: 5.0e-7
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
num_train_epochs: 1
optim: adamw_torch
output_dir: data/zephyr-7b-dpo-full
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
push_to_hub: false
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""


def from_file(tmp_path: Path, text: str, *flags: str) -> TrainConfig:
    (tmp_path / "run.yaml").write_text(text)
    return parse_train(["--config", str(tmp_path / "run.yaml"), *flags])


def documented(script: str) -> list[list[str]]:
    """The command lines in the help of an installed TRL script."""
    path = (
        Path(importlib.util.find_spec("trl").submodule_search_locations[0])
        / "scripts"
        / f"{script}.py"
    )
    found = re.findall(
        r"```bash\n(.*?)```", ast.get_docstring(ast.parse(path.read_text())), re.DOTALL
    )
    return [shlex.split(text.replace("\\\n", " "))[2:] for text in found]


@pytest.mark.parametrize("script", ["dpo", "kto"])
def test_documented_command_lines_of_trl_parse(script, capsys):
    lines = documented(script)
    assert len(lines) == 2
    full, adapters = lines
    config = parse_train(full)
    assert config.output_dir == ("Qwen2-0.5B-DPO" if script == "dpo" else "kto-aligned-model")
    assert config.train_batch_size == 16
    assert config.group_size == (2 if script == "dpo" else 16)
    said = capsys.readouterr().out.splitlines()
    assert said == (
        ["remove_unused_columns: ignored: " + TABLE["remove_unused_columns"].note]
        * (script == "dpo")
    )
    if script == "kto" and importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(FasttrError, match="load_in_4bit: got true without the package"):
            parse_train(adapters)
        adapters.remove("--load_in_4bit")
    config = parse_train(adapters)
    assert (config.use_peft, config.lora_alpha) == (True, 16)
    assert config.lora_r == (32 if script == "dpo" else 16)
    assert config.lora_target_modules == (None if script == "dpo" else "all-linear")


def test_keys_of_an_adapter_without_one_are_said_to_be_left_out(tmp_path, capsys):
    config = parse_train([*NEEDED, "--lora_r", "8", "--lora_alpha", "32"])
    assert (config.use_peft, config.lora_r) == (False, 16)
    assert capsys.readouterr().out == "lora_r: ignored: read only with use_peft: true\n"


def test_a_full_fine_tune_keeps_its_file(tmp_path, capsys):
    config = from_file(tmp_path, FULL_DPO)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])
    assert (config.train_batch_size, config.group_size, config.learning_rate) == (32, 4, 5e-7)
    assert (config.ref_update, config.ref_update_alpha, config.ref_update_every) == (
        "soft",
        0.6,
        64,
    )
    assert (config.eval_strategy, config.save_steps, config.save_total_limit) == ("no", 0.25, None)
    assert (config.lr_scheduler_kwargs, config.report_to, config.tf32) == (
        {"num_cycles": 0.5},
        ["tensorboard"],
        True,
    )
    said = capsys.readouterr().out.splitlines()
    named = [line.split(":")[0] for line in said]
    assert sorted(named) == [
        "dataloader_num_workers",
        "gradient_checkpointing_kwargs",
    ]


def test_an_older_file_keeps_its_meaning(tmp_path, capsys):
    config = from_file(tmp_path, HANDBOOK)
    assert (config.warmup_steps, config.eval_strategy, config.eval_steps) == (0.1, "steps", 100)
    assert (config.train_batch_size, config.group_size, config.beta, config.dtype) == (
        16,
        8,
        0.01,
        "float32",
    )
    assert (config.dataset_train_split, config.dataset_test_split) == ("train_prefs", "test_prefs")
    assert sorted(line.split(":")[0] for line in capsys.readouterr().out.splitlines()) == [
        "do_eval",
        "gradient_checkpointing_kwargs",
        "log_level",
    ]
    config = from_file(tmp_path, HANDBOOK + "max_prompt_length: 512\n")
    assert (config.max_prompt_length, config.hub_model_id) == (512, "zephyr-7b-dpo-full")


def test_flags_win_over_a_file_under_either_name(tmp_path):
    text = (
        "model_name_or_path: m\ndataset_name: d\nactivation_checkpointing: true\nwarmup_ratio: "
        "0.1\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2\nsync_ref_model: true\n"
        "ref_model_sync_steps: 64\n"
    )
    config = from_file(tmp_path, text)
    assert (config.gradient_checkpointing, config.warmup_steps, config.train_batch_size) == (
        True,
        0.1,
        8,
    )
    config = from_file(tmp_path, text, "--gradient_checkpointing", "false", "--warmup_steps", "10")
    assert (config.gradient_checkpointing, config.warmup_steps) == (False, 10)
    config = from_file(tmp_path, text, "--train_batch_size", "6", "--ref_update", "hard")
    assert (config.train_batch_size, config.group_size, config.ref_update) == (6, None, "hard")
    assert config.ref_update_every == 64
    config = from_file(tmp_path, text, "--per-device-train-batch-size", "1", "--no-sync-ref-model")
    assert (config.train_batch_size, config.group_size, config.ref_update) == (2, 1, "none")
    # The older name gives way to the newer one, as in TRL.
    config = from_file(tmp_path, text + "gradient_checkpointing: false\n")
    assert config.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sigmoid", "hinge"], ["sigmoid", "hinge"]),
        (["[sigmoid, hinge]"], ["sigmoid", "hinge"]),
        (['["sigmoid", "hinge"]'], ["sigmoid", "hinge"]),
        (["[ipo]"], "ipo"),
        (["ipo"], "ipo"),
    ],
)
def test_a_list_of_losses_is_read_in_every_spelling(words, expected):
    assert parse_train([*NEEDED, "--loss_type", *words]).loss_type == expected


@pytest.mark.parametrize("words", ["chosen=good prompt=ask", "{chosen: good, prompt: ask}"])
def test_columns_are_named_in_pairs_or_as_in_a_file(words):
    columns = parse_train([*NEEDED, "--columns", words]).columns
    assert columns == {"chosen": "good", "prompt": "ask"}


def test_text_is_read_as_trl_reads_it(tmp_path):
    text = (
        "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-7\n"
        "max_length: None\neval_strategy: no\n"
    )
    config = from_file(
        tmp_path,
        text + "use_cpu: 'yes'\nsave_total_limit: null\n",
        "--bf16",
        "--loss_weights",
        "0.5",
    )
    assert (config.learning_rate, config.max_length, config.use_cpu, config.bf16) == (
        5e-7,
        None,
        True,
        True,
    )
    assert config.loss_weights == [0.5]
    assert parse_train(
        [*NEEDED, "--lr_scheduler_kwargs", '{"num_cycles": 2}']
    ).lr_scheduler_kwargs == {"num_cycles": 2}
    assert (
        parse_train(
            [*NEEDED, "--model_init_kwargs", '{"attn_implementation": "sdpa"}']
        ).attn_implementation
        == "sdpa"
    )
    assert (
        parse_train([*NEEDED, "--attn_implementation", "flash_attention_3"]).attn_implementation
        is None
    )
    assert parse_train([*NEEDED, "--mixed_precision", "bf16"]).bf16 is True


def test_one_unknown_name_is_not_split_into_two_losses():
    with pytest.raises(
        FasttrError, match=r"loss_type: got 'sigmoid,sft'; a list is written \[sigmoid, sft\]"
    ):
        parse_train([*NEEDED, "--loss_type", "sigmoid,sft"])
    with pytest.raises(FasttrError, match=r"beta: got 0.1 0.2; wanted one value"):
        parse_train([*NEEDED, "--beta", "0.1", "0.2"])


def test_odd_flags_are_one_line():
    for words, expected in (
        (["--beta"], "beta: got no value"),
        (["--run_name"], "run_name: got no value"),
        (["--preset", "[1]"], "preset: got"),
        (["--beta", "0.1", "stray"], "beta: got 0.1 stray; wanted one value"),
    ):
        with pytest.raises(FasttrError, match=expected):
            parse_train([*NEEDED, *words])
    with pytest.raises(FasttrError, match="got 'stray' where a flag was wanted"):
        parse_train(["stray", *NEEDED])


def test_values_that_yaml_reads_as_something_else(tmp_path):
    text = "model_name_or_path: m\ndataset_name: d\nrun_name: 2024-01-01\noutput_dir: ~/out\n"
    config = from_file(tmp_path, text)
    assert (config.run_name, config.output_dir) == ("2024-01-01", os.path.expanduser("~/out"))
    with pytest.raises(FasttrError, match="config: a value cannot be written as JSON"):
        from_file(tmp_path, text + "lr_scheduler_kwargs: &a {b: *a}\n")


def test_env_of_a_file_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTTR_TEST_NUMBER", raising=False)
    try:
        from_file(
            tmp_path, "model_name_or_path: m\ndataset_name: d\nenv:\n  FASTTR_TEST_NUMBER: 3\n"
        )
        assert os.environ["FASTTR_TEST_NUMBER"] == "3"
    finally:
        os.environ.pop("FASTTR_TEST_NUMBER", None)
    with pytest.raises(FasttrError, match="env: got"):
        from_file(tmp_path, 'model_name_or_path: m\ndataset_name: d\nenv: {"a=b": 3}\n')
    with pytest.raises(FasttrError, match="env: got"):
        from_file(tmp_path, "model_name_or_path: m\ndataset_name: d\nenv: 3\n")


def test_a_run_under_trls_keys(workspace, tmp_path, capsys):
    """The same file trains, with TRL's names for the batch, the reference and the log."""
    content = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "train.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": "1e-3",
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "max_length": 64,
        "logging_steps": 2,
        "logging_first_step": True,
        "save_strategy": False,
        "use_cpu": True,
        "bf16": False,
        "dataloader_num_workers": 4,
        "tf32": True,
        "train_sampling_strategy": "sequential",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        main(["train", "--config", str(tmp_path / "run.yaml"), "--disable_tqdm"])
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    said = capsys.readouterr().out
    assert said.count("dataloader_num_workers: ignored") == 1
    assert "4 steps of 4 rows" in said
    assert [line["step"] for line in steps(tmp_path / "out")] == [1, 2, 4]
    assert steps(tmp_path / "out")[-1]["ref/updates"] == 1
    assert json.loads((tmp_path / "out" / "train_config.json").read_text())["group_size"] == 2


def test_a_revision_reaches_the_model_and_its_tokenizer(workspace, monkeypatch, tmp_path):
    import transformers

    asked = []
    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        cls = getattr(transformers, name)
        real = cls.from_pretrained

        def spy(*args, _name=name, _real=real, **kwargs):
            asked.append((_name, kwargs.get("revision")))
            return _real(*args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", spy)
    values = settings(workspace, tmp_path, max_steps=1, model_revision="v2")
    main(["train", *(f"--{key}={value}" for key, value in values.items())])
    assert {"AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"} == {
        name for name, revision in asked
    }
    assert {revision for _, revision in asked} == {"v2"}


def test_dropout_that_should_stay_is_refused(workspace, tmp_path, capsys):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(workspace / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    values = settings(workspace, tmp_path / "out", model_name_or_path=folder, disable_dropout=False)
    with pytest.raises(SystemExit):
        main(["train", *(f"--{key}={value}" for key, value in values.items())])
    assert (
        "disable_dropout: got false and the model has attention_dropout" in capsys.readouterr().err
    )
