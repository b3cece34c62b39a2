"""One file, read by TRL's own parser and trainer and by the command of the same word here: the same
steps, rates, losses, gradients and metrics."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

from fasttr import TrainConfig, train
from fasttr.cli import main
from tests.runs import evaluations, lines, settings, steps
from tests.tiny import write_pairs

COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": "1e-3",
    "warmup_steps": 0.25,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "max_length": 64,
    "activation_checkpointing": False,
    "disable_tqdm": True,
    "report_to": "none",
}
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.6}
ALL = ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "entropy", "logits/chosen")
PAIRS = (*ALL, "logps/chosen", "logps/rejected", "rewards/margins", "mean_token_accuracy")
UNPAIRED = (*ALL, "kl", "logps/chosen", "logps/rejected")
UNPAIRED += ("rewards/chosen", "rewards/rejected", "rewards/margins")
COMPLETIONS = ("loss", "grad_norm", "learning_rate")


def theirs(script: str, file: str, output_dir: str) -> list[dict]:
    """The log of TRL's trainer, set up as its script does."""
    import trl
    from datasets import load_dataset

    parser = importlib.import_module(f"trl.scripts.{script}").make_parser()
    script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(
        ["--config", file, "--output_dir", output_dir]
    )
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    if dataset_args.datasets:
        dataset = trl.get_dataset(dataset_args)
    else:
        streaming = script_args.dataset_streaming
        dataset = load_dataset(script_args.dataset_name, streaming=streaming)
    evaluates = training_args.eval_strategy != "no"
    trainer = getattr(trl, f"{script.upper()}Trainer")(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if evaluates else None,
    )
    trainer.train()
    return trainer.state.log_history


def pairs(folder: Path, count: int) -> list[dict]:
    """Rows of which the first is long, so that a cut at 24 tokens bites."""
    write_pairs(folder / "pairs.jsonl", count, seed=3)
    text = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").unlink()
    return [json.loads(line) for line in text.splitlines()]


def unpaired(folder: Path, count: int) -> list[dict]:
    """Two desirable rows, then an undesirable one."""
    return [
        {
            "prompt": pair["prompt"],
            "completion": pair["chosen" if i % 3 else "rejected"],
            "label": bool(i % 3),
        }
        for i, pair in enumerate(pairs(folder, count))
    ]


def desirable(folder: Path, count: int) -> list[dict]:
    """So that every log-prob rises, and the estimate of KL is above 0."""
    return [{**row, "label": True} for row in unpaired(folder, count)]


def with_numbers(folder: Path, count: int) -> list[dict]:
    return [{**row, "label": float(row["label"])} for row in unpaired(folder, count)]


def completions(folder: Path, count: int) -> list[dict]:
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in pairs(folder, count)
    ]


def with_twins(folder: Path, count: int) -> list[dict]:
    """Some pairs whose sides are the same."""
    return [
        {**pair, "rejected": pair["chosen"]} if i % 4 == 1 else pair
        for i, pair in enumerate(pairs(folder, count))
    ]


# name: (command, values beside COMMON, rows, how many, keys that agree)
CASES = {
    "a moving reference, and a smaller last micro-batch": (
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], **MOVING},
        pairs,
        15,
        PAIRS,
    ),
    "ld_alpha leaves the sft term alone": (
        "dpo",
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.3, "num_train_epochs": 1},
        pairs,
        8,
        PAIRS,
    ),
    "the last rows are left out, in order": (
        "dpo",
        {"dataloader_drop_last": True, "train_sampling_strategy": "sequential"},
        pairs,
        13,
        PAIRS,
    ),
    "another seed of the order": (
        "dpo",
        {
            "dataloader_drop_last": True,
            "data_seed": 7,
            "optim": "adamw_torch",
            "max_grad_norm": 0.5,
        },
        pairs,
        11,
        PAIRS,
    ),
    "an odd last micro-batch of a coupled loss": (
        "dpo",
        {"loss_type": "aot", "gradient_accumulation_steps": 3, "num_train_epochs": 1},
        pairs,
        11,
        PAIRS,
    ),
    "identical sides keep their place": (
        "dpo",
        {"num_train_epochs": 1},
        with_twins,
        12,
        PAIRS,
    ),
    "both sides cut on the left": (
        "dpo",
        {"truncation_mode": "keep_end", "max_length": 20, "num_train_epochs": 1},
        pairs,
        10,
        PAIRS,
    ),
    "a stream": (
        "dpo",
        {"dataset_streaming": True, "max_steps": 3},
        pairs,
        14,
        PAIRS,
    ),
    "rmsprop": (
        "dpo",
        {"optim": "rmsprop", "optim_args": "momentum=0.5", "weight_decay": 0.1},
        pairs,
        8,
        PAIRS,
    ),
    "sgd": ("dpo", {"optim": "sgd", "learning_rate": 0.1}, pairs, 8, PAIRS),
    "adafactor": ("dpo", {"optim": "adafactor"}, pairs, 8, PAIRS),
    "labels as numbers": (
        "kto",
        {"loss_type": "apo_zero_unpaired", "num_train_epochs": 1},
        with_numbers,
        12,
        UNPAIRED,
    ),
    "kto on pairs, without a loss": ("kto", {"num_train_epochs": 1}, pairs, 7, UNPAIRED),
    "kto in the order of the rows, a smaller last micro-batch": (
        "kto",
        {"desirable_weight": 0.5, **MOVING},
        unpaired,
        15,
        UNPAIRED,
    ),
    "kto with mismatched completions that are cut": (
        "kto",
        {"loss_type": "kto", "max_length": 22, "num_train_epochs": 1},
        unpaired,
        14,
        UNPAIRED,
    ),
    "kto with processes that rotate by themselves": (
        "kto",
        {"dataset_num_proc": 2, "per_device_train_batch_size": 4, "num_train_epochs": 1},
        unpaired,
        14,
        UNPAIRED,
    ),
    "kto on pairs, one of which is dropped": (
        "kto",
        {"max_length": 14, "num_train_epochs": 1, "loss_type": "apo_zero_unpaired"},
        pairs,
        12,
        UNPAIRED,
    ),
    "sft": ("sft", {"gradient_accumulation_steps": 3}, completions, 13, COMPLETIONS),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_file_gives_the_same_run(case, workspace, tmp_path):
    script, values, make_rows, count, keys = CASES[case]
    data = tmp_path / "data"
    data.mkdir()
    rows = make_rows(data, count)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(workspace / "model", tmp_path / "model")
    content = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(data),
        **COMMON,
        **values,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    main([script, "--config", str(file), "--output_dir", str(tmp_path / "ours")])
    log = theirs(script, str(file), str(tmp_path / "theirs"))
    expected = [line for line in log if "grad_norm" in line]
    assert_same_steps(steps(tmp_path / "ours"), expected, keys)


EVALUATED = {
    "kto": ("kto", {"per_device_eval_batch_size": 3}, desirable, ("loss", "kl")),
    "aot, in batches of 8": ("dpo", {"loss_type": "aot"}, pairs, ("loss",)),
    "sft": ("sft", {}, completions, ("loss",)),
}


@pytest.mark.parametrize("case", EVALUATED)
def test_a_coupled_loss_is_evaluated_in_the_batches_of_an_evaluation(case, workspace, tmp_path):
    """Of 8 rows, TRL's default, or of 3, where those of training are of 2; after a step so long
    that policy and reference differ."""
    script, values, make_rows, keys = EVALUATED[case]
    data = tmp_path / "data"
    for split, count in (("train", 4), ("test", 24)):
        data.mkdir(exist_ok=True)
        rows = make_rows(data, count)
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(workspace / "model", tmp_path / "model")
    content = {
        **COMMON,
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(data),
        "num_train_epochs": 1,
        "learning_rate": 0.03,
        "warmup_steps": 0,
        "eval_strategy": "epoch",
        **values,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    main([script, "--config", str(file), "--output_dir", str(tmp_path / "ours")])
    log = theirs(script, str(file), str(tmp_path / "theirs"))
    (wanted,) = [line for line in log if "eval_loss" in line]
    (found,) = evaluations(tmp_path / "ours")
    for key in keys:
        assert found[f"eval_{key}"] == pytest.approx(wanted[f"eval_{key}"], rel=1e-5), key
        assert wanted[f"eval_{key}"] > 0.01


def test_a_rate_that_follows_evaluations_is_transformers(workspace, tmp_path):
    """Plateaus after an evaluation that is no better, with a rate so high that there is one."""
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", pairs(data, 12)), ("test", pairs(data, 6))):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(workspace / "model", tmp_path / "model")
    content = {
        **COMMON,
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(data),
        "learning_rate": 0.03,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "factor": 0.3},
        "warmup_steps": 0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_loss",
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    main(["dpo", "--config", str(file), "--output_dir", str(tmp_path / "ours")])
    log = theirs("dpo", str(file), str(tmp_path / "theirs"))
    wanted = [line["learning_rate"] for line in log if "grad_norm" in line]
    assert len(set(wanted)) > 1
    assert [line["learning_rate"] for line in steps(tmp_path / "ours")] == pytest.approx(wanted)
    losses = [line["eval_loss"] for line in evaluations(tmp_path / "ours")]
    theirs_losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert losses == pytest.approx(theirs_losses, rel=1e-5)


def test_several_evaluation_sets_have_metrics_under_their_names(workspace, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = pairs(tmp_path, 20)
    sets = {"short": rows[8:12], "long": rows[12:]}
    values = settings(workspace, tmp_path / "ours", max_steps=2, train_batch_size=4, max_length=64)
    values |= {"eval_strategy": "steps", "eval_steps": 1, "dataset_name": None}
    train(TrainConfig(**values), train_dataset=rows[:8], eval_dataset=sets)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(workspace / "model"),
        args=DPOConfig(
            output_dir=str(tmp_path / "theirs"),
            use_cpu=True,
            bf16=False,
            max_length=64,
            max_steps=2,
            learning_rate=values["learning_rate"],
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows[:8]),
        eval_dataset={name: Dataset.from_list(part) for name, part in sets.items()},
        processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
    )
    trainer.train()
    first, second = (line for line in lines(tmp_path / "ours") if "eval_short_loss" in line)
    for name in sets:
        log = [line for line in trainer.state.log_history if f"eval_{name}_loss" in line]
        for key in ("loss", "rewards/margins", "logps/chosen"):
            full = f"eval_{name}_{key}"
            # TRL gives the set's name to the loss alone.
            wanted = [line[full if key == "loss" else f"eval_{key}"] for line in log]
            assert [first[full], second[full]] == pytest.approx(wanted, rel=1e-5), full
    assert first["eval_short_loss"] != first["eval_long_loss"]


def assert_same_steps(ours: list[dict], expected: list[dict], keys: tuple[str, ...]) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    assert len(ours) >= 2
    compared = set()
    for mine, line in zip(ours, expected, strict=True):
        for key in keys:
            assert (key in mine) == (key in line), (line["step"], key)
            if key not in line:
                continue
            compared.add(key)
            # Means of logits and log-ratios lie near 0 against terms of order 1 and more.
            slack = 5e-6 if key.startswith(("logits", "rewards", "kl")) else 1e-9
            assert mine[key] == pytest.approx(line[key], rel=1e-5, abs=slack), (line["step"], key)
    assert compared == set(keys)
