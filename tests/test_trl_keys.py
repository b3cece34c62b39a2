"""A file or command line of TRL is kept: every key is classed, and means what TRL means or stops with advice."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fasttr.cadence import Cadence
from fasttr.cli import main, parse_train
from fasttr.config import TrainConfig
from fasttr.errors import FasttrError
from fasttr.mixture import Part
from fasttr.plan import Plan
from fasttr.trl_keys import markdown, translate
from fasttr.trl_table import KTO_DEFAULTS, LAUNCH, OLDER, TABLE
from tests.runs import evaluations, same_weights, settings, steps

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
# Model arguments
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
torch_dtype: null

# Data training arguments
dataset_name: HuggingFaceH4/ultrafeedback_binarized
dataset_train_split: train_prefs
dataset_test_split: test_prefs
dataset_num_proc: 12

# DPOTrainer arguments
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


def their_fields() -> dict[str, dict]:
    """The fields of TRL's dataclasses with their defaults, by class."""
    from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig

    def default(field):
        return field.default_factory() if field.default is dataclasses.MISSING else field.default

    classes = (DPOConfig, KTOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
    return {cls.__name__: {field.name: default(field) for field in dataclasses.fields(cls)} for cls in classes}


def test_every_key_of_the_installed_trl_is_classed_with_its_default():
    theirs = their_fields()
    fields = {name for found in theirs.values() for name in found}
    assert fields - TABLE.keys() == set()
    extra = {key.name for key in [*LAUNCH, *OLDER]} | {"env"}
    assert TABLE.keys() - fields - extra == set()
    for cls, found in theirs.items():
        for name, default in found.items():
            ours = KTO_DEFAULTS.get(name, TABLE[name].default) if cls == "KTOConfig" else TABLE[name].default
            assert ours == default, (cls, name)
            assert isinstance(ours, bool) == isinstance(default, bool), (cls, name)


def test_the_parts_of_a_mixture_have_trls_keys():
    from trl.scripts.utils import DatasetConfig

    ours, theirs = ({f.name: f.default for f in dataclasses.fields(cls)} for cls in (Part, DatasetConfig))
    assert ours == theirs


def test_every_kind_is_carried_out():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for key in TABLE.values():
        if key.kind == "honoured":
            assert key.name in fields | {"optim", "env"}, key
        if key.kind == "renamed":
            assert set(key.ours.split(", ")) <= fields, key
        if key.kind in ("ignored", "refused"):
            assert key.name not in fields
            assert key.note, key


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_default_of_trl_is_accepted_silently(name):
    for default in (TABLE[name].default, KTO_DEFAULTS.get(name, TABLE[name].default)):
        ours, notices = translate({"train_sampling_strategy": "random", name: default})
        assert notices == []
        assert "ref_update" not in ours or ours["ref_update"] == "none"


def other_value(name: str):
    """A value of the key's type that is not its default."""
    key = TABLE[name]
    kind = key.type.removesuffix("?")
    if kind == "bool":
        return not key.default
    made = {"int": 7, "float": 0.25, "str": "something", "names": ["something"], "dict": {"a": 1}, "any": "something"}
    return made[kind]


@pytest.mark.parametrize("name", sorted(key.name for key in TABLE.values() if key.kind == "refused"))
def test_what_is_refused_gives_its_advice(name):
    with pytest.raises(FasttrError) as stopped:
        translate({name: other_value(name)})
    assert str(stopped.value).startswith(f"{name}: got ")
    assert str(stopped.value).endswith(TABLE[name].note)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", sorted(key.name for key in TABLE.values() if key.kind == "ignored"))
def test_what_is_ignored_says_so_once(name):
    ours, notices = translate({name: other_value(name)})
    assert ours == {}
    assert notices == [f"{name}: ignored: {TABLE[name].note}"]


def documented(script: str) -> list[list[str]]:
    """The command lines in the help of an installed TRL script."""
    path = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "scripts" / f"{script}.py"
    found = re.findall(r"```bash\n(.*?)```", ast.get_docstring(ast.parse(path.read_text())), re.DOTALL)
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
    assert said == (["remove_unused_columns: ignored: " + TABLE["remove_unused_columns"].note] * (script == "dpo"))
    with pytest.raises(FasttrError, match=r"adapters are not built|full-precision weights"):
        parse_train(adapters)


def test_a_full_fine_tune_keeps_its_file(tmp_path, capsys):
    config = from_file(tmp_path, FULL_DPO)
    assert (config.loss_type, config.loss_weights) == (["sigmoid", "sft"], [1.0, 0.2])
    assert (config.train_batch_size, config.group_size, config.learning_rate) == (32, 4, 5e-7)
    assert (config.ref_update, config.ref_update_alpha, config.ref_update_every) == ("soft", 0.6, 64)
    assert (config.eval_strategy, config.save_steps, config.save_total_limit) == ("no", 0.25, None)
    assert (config.lr_scheduler_kwargs, config.report_to, config.tf32) == ({"num_cycles": 0.5}, ["tensorboard"], True)
    said = capsys.readouterr().out.splitlines()
    named = [line.split(":")[0] for line in said]
    assert sorted(named) == ["dataloader_num_workers", "gradient_checkpointing_kwargs", "per_device_eval_batch_size"]


def test_an_older_file_keeps_its_meaning(tmp_path, capsys):
    config = from_file(tmp_path, HANDBOOK)
    assert (config.warmup_steps, config.eval_strategy, config.eval_steps) == (0.1, "steps", 100)
    assert (config.train_batch_size, config.group_size, config.beta, config.dtype) == (16, 8, 0.01, "float32")
    assert (config.dataset_train_split, config.dataset_test_split) == ("train_prefs", "test_prefs")
    assert sorted(line.split(":")[0] for line in capsys.readouterr().out.splitlines()) == [
        "do_eval", "gradient_checkpointing_kwargs", "hub_model_id", "log_level",
    ]  # fmt: skip
    with pytest.raises(FasttrError, match=r"max_prompt_length: got 512; TRL 1.16 cuts by max_length alone"):
        from_file(tmp_path, HANDBOOK + "max_prompt_length: 512\n")


def test_flags_win_over_a_file_under_either_name(tmp_path):
    text = (
        "model_name_or_path: m\ndataset_name: d\nactivation_checkpointing: true\nwarmup_ratio: 0.1\n"
        "per_device_train_batch_size: 4\ngradient_accumulation_steps: 2\nsync_ref_model: true\n"
        "ref_model_sync_steps: 64\n"
    )
    config = from_file(tmp_path, text)
    assert (config.gradient_checkpointing, config.warmup_steps, config.train_batch_size) == (True, 0.1, 8)
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


def test_a_soft_update_with_all_of_the_policy_is_hard():
    ours, _ = translate({"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": "128"})
    assert (ours["ref_update"], ours["ref_update_every"]) == ("hard", 128)
    _, notices = translate({"ref_model_sync_steps": 128})
    assert notices == ["ref_model_sync_steps: ignored: read only with sync_ref_model: true"]


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


def test_text_is_read_as_trl_reads_it(tmp_path):
    text = "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-7\nmax_length: None\neval_strategy: no\n"
    config = from_file(tmp_path, text + "use_cpu: 'yes'\nsave_total_limit: null\n", "--bf16", "--loss_weights", "0.5")
    assert (config.learning_rate, config.max_length, config.use_cpu, config.bf16) == (5e-7, None, True, True)
    assert config.loss_weights == [0.5]
    assert parse_train([*NEEDED, "--lr_scheduler_kwargs", '{"num_cycles": 2}']).lr_scheduler_kwargs == {"num_cycles": 2}
    assert (
        parse_train([*NEEDED, "--model_init_kwargs", '{"attn_implementation": "sdpa"}']).attn_implementation == "sdpa"
    )
    assert parse_train([*NEEDED, "--attn_implementation", "flash_attention_3"]).attn_implementation is None
    assert parse_train([*NEEDED, "--mixed_precision", "bf16"]).bf16 is True


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"loss_type": "bco"}, "loss_type: got 'bco'; TRL 1.16 has no bco for unpaired rows"),
        ({"optim": "adafactor"}, "optim: got 'adafactor'; wanted one of adamw_torch, adamw_torch_fused"),
        ({"max_steps": "1e3"}, "max_steps: got 1e3; wanted int"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: got 2.5; wanted int"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: got 0; wanted a whole number from 1"),
        ({"per_device_train_batch_size": 2, "train_batch_size": 4}, "leave one of them out"),
        ({"sync_ref_model": True, "ref_update": "none"}, "sync_ref_model: got True beside ref_update none"),
        ({"no_bf16": True}, "unknown key 'no_bf16': write bf16: false"),
        ({"per_device_train_batchsize": 4}, "did you mean 'per_device_train_batch_size'"),
        ({"sync_ref_modle": True}, "did you mean 'sync_ref_model'"),
        ({"use_cpu": "maybe"}, "use_cpu: got maybe; wanted bool"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: got device_map: 'auto'"),
        ({"model_init_kwargs": "text"}, "model_init_kwargs: got 'text'; wanted a mapping"),
        ({"mixed_precision": "fp16"}, "mixed_precision: got 'fp16'; use bf16"),
        ({"warmup_ratio": 2}, "warmup_ratio: got 2; wanted a share"),
        ({"num_processes": 8}, "num_processes: got 8; one process trains"),
        ({"accelerate_config": "zero3"}, "accelerate_config: got 'zero3'; one process trains"),
        ({"learning_rate": True}, "learning_rate: got True; wanted float"),
    ],
)
def test_a_wrong_value_is_one_line(values, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        translate(values)


def test_one_unknown_name_is_not_split_into_two_losses():
    with pytest.raises(FasttrError, match="loss_type: got 'sigmoid,sft'; wanted one of"):
        parse_train([*NEEDED, "--loss_type", "sigmoid,sft"])
    with pytest.raises(FasttrError, match=r"beta: got 0.1 0.2; wanted one value"):
        parse_train([*NEEDED, "--beta", "0.1", "0.2"])


def test_kto_says_that_its_order_is_random():
    _, notices = translate({"loss_type": "kto"})
    assert any(line.startswith("train_sampling_strategy: absent, so random") for line in notices)
    assert translate({"loss_type": "kto", "train_sampling_strategy": "sequential"})[1] == []


def test_env_of_a_file_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTTR_TEST_NUMBER", raising=False)
    try:
        from_file(tmp_path, "model_name_or_path: m\ndataset_name: d\nenv:\n  FASTTR_TEST_NUMBER: 3\n")
        assert os.environ["FASTTR_TEST_NUMBER"] == "3"
    finally:
        os.environ.pop("FASTTR_TEST_NUMBER", None)
    with pytest.raises(FasttrError, match="env: got"):
        from_file(tmp_path, "model_name_or_path: m\ndataset_name: d\nenv: 3\n")


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["train", *NEEDED])
    assert "start without torchrun" in capsys.readouterr().err


class Rows:
    """Eleven rows for a plan that is asked for order alone."""

    def __len__(self):
        return 11


def cadence(**changes) -> Cadence:
    config = TrainConfig(model_name_or_path="m", dataset_name="d", train_batch_size=2, **changes)
    return Cadence(config, Plan(Rows(), 2, 2.0, -1, 0, 100))  # 6 steps an epoch, 12 in all


def when(asked) -> list[int]:
    return [step for step in range(1, 13) if asked(step)]


def test_steps_and_shares_and_epochs_are_when_they_say():
    assert when(cadence(logging_steps=5).logs) == [5, 10, 12]
    assert when(cadence(logging_steps=5, logging_first_step=True).logs) == [1, 5, 10, 12]
    assert when(cadence(logging_strategy="epoch").logs) == [6, 12]
    assert when(cadence(logging_strategy="no").logs) == []
    assert when(cadence(logging_steps=0.25).logs) == [3, 6, 9, 12]
    assert when(cadence(save_steps=0.4).saves) == [5, 10, 12]  # ceil(4.8), as TRL
    assert when(cadence(save_strategy="epoch").saves) == [6, 12]
    assert when(cadence(save_strategy="no").saves) == []
    assert when(cadence(eval_strategy="steps", logging_steps=4).evaluates) == [4, 8, 12]
    assert when(cadence(eval_strategy="steps", eval_steps=4, eval_delay=5).evaluates) == [8, 12]
    assert when(cadence(eval_strategy="epoch", eval_delay=1.5).evaluates) == [12]


def test_the_last_rows_are_dropped_when_they_do_not_fill_a_batch():
    plan = Plan(Rows(), 4, 1.0, -1, 0, 100, shuffle=False, multiple_of=2)  # 11 rows: 10 of them in batches of 2
    assert plan.steps_per_epoch == 3
    assert [plan.rows(step).tolist() for step in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
    assert Plan(Rows(), 4, 1.0, -1, 0, 100, multiple_of=4).steps_per_epoch == 2
    kept = np.concatenate([plan.rows(step) for step in range(plan.total_steps)])
    assert len(set(kept.tolist())) == 10


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"load_best_model_at_end": True}, "with eval_strategy no"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "wanted that of eval_strategy, or best"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 6},
            "a multiple of 4",
        ),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "gold"}, "metric_for_best_model"),
        (
            {"save_strategy": "best", "eval_strategy": "steps", "ref_update": "soft"},
            "different references do not compare",
        ),
        ({"logging_steps": 0}, "logging_steps: got 0"),
        ({"save_steps": 1.5}, "save_steps: got 1.5; wanted a whole number from 1, or a share"),
        ({"eval_delay": -1}, "eval_delay: got -1"),
    ],
)
def test_contradictions_about_checkpoints_are_refused(changes, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        TrainConfig(model_name_or_path="m", dataset_name="d", **changes)


def test_the_best_checkpoint_outlives_the_limit_and_becomes_the_model(workspace, tmp_path, capsys):
    values = settings(
        workspace, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=1, save_only_model=True, load_best_model_at_end=True, greater_is_better=True,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )  # fmt: skip
    main(["train", *(f"--{key}={value}" for key, value in values.items())])
    losses = [line["eval_loss"] for line in evaluations(tmp_path)]
    best = losses.index(max(losses)) + 1
    assert best < 3  # the loss falls; were the best among the last, the limit would not be tested
    folders = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert folders == {f"checkpoint-{best}", "checkpoint-4"}
    assert same_weights(tmp_path, tmp_path / f"checkpoint-{best}")
    assert not (tmp_path / "checkpoint-4" / "fasttr").exists()
    assert (tmp_path / "tokenizer.json").is_file()
    assert f"the final model is checkpoint-{best}, the best by eval_loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", *(f"--{key}={value}" for key, value in values.items()), "--resume_from_checkpoint"])
    assert "holds no reference, position or window" in capsys.readouterr().err


def test_save_strategy_best_saves_what_improves(workspace, tmp_path):
    values = settings(
        workspace, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="best", ref_update="hard",
        ref_update_every=2, metric_for_best_model="anchor/rewards/margins",
        eval_dataset_name=str(workspace / "test.jsonl"),
    )  # fmt: skip
    main(["train", *(f"--{key}={value}" for key, value in values.items())])
    best, expected = float("-inf"), set()
    for line in evaluations(tmp_path):
        if line["eval_anchor/rewards/margins"] > best:
            best = line["eval_anchor/rewards/margins"]
            expected.add(f"checkpoint-{line['step']}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == expected != set()


def test_a_run_under_trls_keys(workspace, tmp_path, capsys):
    """The same file trains, with TRL's names for the batch, the reference and the log."""
    content = {
        "model_name_or_path": str(workspace / "model"), "dataset_name": str(workspace / "train.jsonl"),
        "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 4, "learning_rate": "1e-3", "sync_ref_model": True, "ref_model_sync_steps": 2, "max_length": 64,
        "logging_steps": 2, "logging_first_step": True, "save_strategy": False, "use_cpu": True, "bf16": False,
        "per_device_eval_batch_size": 4, "tf32": True, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        main(["train", "--config", str(tmp_path / "run.yaml"), "--disable_tqdm"])
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    said = capsys.readouterr().out
    assert said.count("per_device_eval_batch_size: ignored") == 1
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
    assert {"AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"} == {name for name, revision in asked}
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
    assert "disable_dropout: got false and the model has attention_dropout" in capsys.readouterr().err


def test_the_table_for_readers_holds_every_key():
    table = markdown()
    assert all(f"| `{name}` |" in table for name in TABLE)
    assert all(line.count("|") == 5 for line in table.splitlines() if line.startswith("|"))
