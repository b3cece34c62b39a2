"""The command line: flags, files and presets, and mistakes that end in one line and a non-zero
status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fasttr import TrainConfig
from fasttr.cli import main
from fasttr.cli.train import parse_train
from fasttr.errors import FasttrError
from tests.runs import read_rows, settings, steps

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def one_line(capsys, args) -> str:
    """The error of a command that fails: one line on standard error, exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("fasttr: error: ")
    return error[0].removeprefix("fasttr: error: ")


def flags(values: dict) -> list[str]:
    return [
        f"--{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in values.items()
    ]


def test_flags_override_the_file_which_overrides_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-7\nbeta: 0.2\nmax_length: none\n"
    )
    config = parse_train(["--preset", "tr-soft", "--config", str(file), "--beta", "0.3"])
    assert (config.learning_rate, config.beta, config.max_length) == (5e-7, 0.3, None)
    assert (config.ref_update, config.ref_update_alpha, config.ref_update_every) == (
        "soft",
        0.6,
        64,
    )
    assert config.max_grad_norm == 2.0


def test_defaults_are_trls():
    from trl import DPOConfig

    theirs = DPOConfig(output_dir="x", use_cpu=True, bf16=False)
    ours = TrainConfig(model_name_or_path="m", dataset_name="d")
    for key in (
        "beta",
        "learning_rate",
        "max_length",
        "num_train_epochs",
        "max_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "seed",
        "data_seed",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "warmup_steps",
        "full_determinism",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.train_batch_size == theirs.per_device_train_batch_size
    # TRL recomputes always; here a GPU with room for it keeps what it has made.
    assert theirs.gradient_checkpointing is True
    assert ours.gradient_checkpointing is None
    for key in ("lr_scheduler_type", "save_strategy", "eval_strategy"):
        assert getattr(ours, key) == getattr(theirs, key).value
    assert (ours.ref_update_alpha, ours.ref_update_every) == (
        theirs.ref_model_mixup_alpha,
        theirs.ref_model_sync_steps,
    )


def test_printed_config_runs_again_as_a_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", *NEEDED, "--ref_update", "hard", "--eval_strategy", "no", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["ref_update"] == "hard"
    (tmp_path / "again.yaml").write_text(printed)
    assert parse_train(["--config", str(tmp_path / "again.yaml")]).ref_update == "hard"


def test_yaml_spellings_that_trl_takes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_name: d\nloss_type: [ipo]\neval_strategy: no\ndata_seed: "
        "None\n"
    )
    config = parse_train(["--config", str(file)])
    assert (config.loss_type, config.eval_strategy, config.data_seed) == ("ipo", "no", None)
    assert parse_train([*NEEDED, "--resume_from_checkpoint", "true"]).resume_from_checkpoint is True
    assert (
        parse_train([*NEEDED, "--resume_from_checkpoint", "x/checkpoint-2"]).resume_from_checkpoint
        == "x/checkpoint-2"
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--lerning_rate", "1"], r"unknown key 'lerning_rate' \(did you mean 'learning_rate'\?\)"),
        (["--learning_rate", "fast"], "learning_rate: got fast; wanted float"),
        (
            ["--ref_update", "sof"],
            "ref_update: got 'sof'; wanted one of none, soft, hard .did you mean 'soft'",
        ),
        (["--max_steps", "1.5"], "max_steps: got 1.5; wanted int"),
        (["--beta", "0"], "beta: got 0.0; wanted a number above 0"),
        (["--beta", "nan"], "beta: got nan"),
        (
            ["--ref_update_alpha", "1.5", "--ref_update", "soft"],
            "ref_update_alpha: got 1.5; wanted a number from 0 to 1",
        ),
        (["--ref_update_every", "0", "--ref_update", "hard"], "ref_update_every: got 0"),
        (["--max_length", "1"], "max_length: got 1; wanted a whole number from 2"),
        (["--train_batch_size", "0"], "train_batch_size: got 0"),
        (["--loss_type", "hunge"], "loss_type: got 'hunge'; wanted one of sigmoid"),
        (["--loss_type", "[sigmoid,kto]"], "stands alone: wanted one name"),
        (["--loss_type", "sft", "--ref_update", "soft"], "loss_type sft has no reference"),
        (["--preset", "tr-sof"], "preset: got 'tr-sof'; wanted one of tr-soft, tr-hard"),
        (["--preset", "tr-hard", "--ref_update", "soft"], "with preset tr-hard"),
        (
            ["--lr_scheduler_type", "reduce_lr_on_plateau"],
            "lr_scheduler_type: got reduce_lr_on_plateau with eval_strategy no; wanted steps",
        ),
        (["--dtype", "float16"], "dtype: got 'float16'; wanted one of float32, bfloat16"),
        (["--report_to", "carrier_pigeon"], "report_to"),
        (
            ["--output_dir", "a" * 300],
            "output_dir: got 'a+...', which cannot be a path here: File name too long",
        ),
        (["--config", "/nowhere.yaml"], "config: cannot read '/nowhere.yaml'"),
    ],
)
def test_a_wrong_setting_is_one_line(capsys, args, expected):
    assert re.search(expected, one_line(capsys, ["train", *NEEDED, *args]))


def test_a_missing_key_and_a_wrong_command_are_one_line(capsys):
    assert "dataset_name" in one_line(capsys, ["train", "--model_name_or_path", "m"])
    assert "did you mean 'train'" in one_line(capsys, ["trian"])
    assert "did you mean 'llama'" in one_line(
        capsys, ["init", "--arch", "lama", "--tokenizer_data", "x"]
    )


def failing_run(workspace, tmp_path, capsys, **changes) -> str:
    """The line of a run that stops on its input; it leaves no model behind."""
    message = one_line(capsys, ["train", *flags(settings(workspace, tmp_path / "out", **changes))])
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    return message


def test_mistakes_in_the_data_are_one_line(workspace, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    assert "line 2" in failing_run(workspace, tmp_path, capsys, dataset_name=broken)
    column = tmp_path / "column.jsonl"
    column.write_text('{"prompt": "a", "chosen": "b"}\n')
    assert "rejected" in failing_run(workspace, tmp_path, capsys, dataset_name=column)
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty" in failing_run(
        workspace, tmp_path, capsys, dataset_name=tmp_path / "empty.jsonl"
    )
    assert "missing.jsonl" in failing_run(
        workspace, tmp_path, capsys, dataset_name=tmp_path / "missing.jsonl"
    )
    unpaired = tmp_path / "unpaired.jsonl"
    unpaired.write_text('{"prompt": "a", "completion": "b", "label": true}\n')
    assert "wanted pairs" in failing_run(
        workspace, tmp_path, capsys, dataset_name=unpaired, loss_type="sigmoid"
    )


def changed_model(workspace, tmp_path, change_config=None, change_weights=None) -> Path:
    """A copy of the workspace's model with something wrong."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(workspace / "model", folder)
    if change_config:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change_config))
    if change_weights:
        tensors = load_file(folder / "model.safetensors")
        change_weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_mistakes_in_the_model_are_one_line(workspace, tmp_path, capsys):
    assert "there is no folder" in failing_run(
        workspace, tmp_path, capsys, model_name_or_path=tmp_path / "nowhere"
    )

    def poison(tensors):
        tensors["model.norm.weight"][0] = float("nan")

    model = changed_model(workspace, tmp_path / "a", change_weights=poison)
    message = failing_run(workspace, tmp_path, capsys, model_name_or_path=model)
    assert "holds NaN or infinity in model.norm.weight" in message
    model = changed_model(workspace, tmp_path / "b", {"model_type": "t5"})
    message = failing_run(workspace, tmp_path, capsys, model_name_or_path=model)
    assert "architecture 't5', of which transformers has no causal language model" in message
    model = changed_model(workspace, tmp_path / "b2", {"model_type": "bert"})
    message = failing_run(workspace, tmp_path, capsys, model_name_or_path=model)
    assert "depends on the tokens after it" in message


def test_a_tokenizer_without_eos_is_one_line(workspace, tmp_path, capsys):
    folder = changed_model(workspace, tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            content.pop("eos_token", None)
            (folder / name).write_text(json.dumps(content))
    assert "EOS" in failing_run(workspace, tmp_path, capsys, model_name_or_path=folder)


def test_a_loss_that_is_no_longer_finite_stops_the_run(workspace, tmp_path, capsys):
    """A rate of 1e30 makes the weights infinite at once; the step and the last good checkpoint are
    named."""
    args = flags(
        settings(
            workspace,
            tmp_path,
            learning_rate=1e30,
            save_strategy="steps",
            save_steps=1,
            logging_steps=9,
            max_grad_norm=0,
        )
    )
    message = one_line(capsys, ["train", *args])
    broken = re.match(r"step ([23]): the loss or its gradient is not finite \(rows \d+", message)
    assert broken
    assert "checkpoint-1" in message
    assert not (tmp_path / f"checkpoint-{broken[1]}").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_it_says_what_it_will_do_and_warns_when_the_reference_never_moves(
    workspace, tmp_path, capsys
):
    main(["train", *flags(settings(workspace, tmp_path, max_steps=2, ref_update="hard"))])
    said = capsys.readouterr().out
    assert "read 24 rows" in said
    assert f" packed, {repeated_tokens(workspace) / 6:,.0f} with prompts repeated\n" in said
    assert "reference: hard, 0 updates planned\n" in said
    assert (
        "WARNING: the reference will never move: ref_update_every is 512 and the run has 2 steps"
        in said
    )


def repeated_tokens(workspace) -> int:
    """Of all pairs, each side with its prompt and EOS, as the tokenizer counts them."""
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    return sum(
        len(tokenizer(row["prompt"])["input_ids"])
        + len(tokenizer(row[side], add_special_tokens=False)["input_ids"])
        + 1
        for row in read_rows(workspace / "train.jsonl")
        for side in ("chosen", "rejected")
    )


def test_tensorboard_and_plots_are_written(workspace, tmp_path, capsys):
    main(
        [
            "train",
            *flags(
                settings(
                    workspace,
                    tmp_path,
                    report_to="tensorboard",
                    ref_update="soft",
                    ref_update_every=2,
                )
            ),
        ]
    )
    assert list((tmp_path / "runs").glob("events.out.tfevents.*"))
    main(["plot", str(tmp_path)])
    assert {path.suffix for path in (tmp_path / "plots").iterdir()} == {".png"}
    expected = {
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
        "epoch",
        "perf/tokens_per_second",
        "perf/pairs_per_second",
        "perf/padding_fraction",
        "memory/peak_gib",
        "ref/updates",
        "ref/age_steps",
        "ref/distance",
    }
    assert expected <= steps(tmp_path)[0].keys()


def test_the_installed_command_exits_with_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fasttr", "train", *NEEDED, "--beta", "-1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ".:kernels"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "fasttr: error: beta: got -1.0; wanted a number above 0\n",
    )


def test_values_out_of_range_are_refused_in_python_too():
    with pytest.raises(FasttrError, match="beta"):
        TrainConfig(model_name_or_path="m", dataset_name="d", beta=-1.0)
    assert torch.get_default_dtype() == torch.float32


def test_a_reader_that_has_enough_ends_the_command_in_silence():
    """As `fasttr --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fasttr", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": ".:kernels", "PYTHONUNBUFFERED": "1"},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
