"""One file, read by TRL's own parser and trainer and by `fasttr train`: the same steps, rates,
losses and gradients."""

import json
import shutil

import pytest
import yaml

from fasttr.cli import main
from tests.runs import steps
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


def theirs(script: str, file: str, output_dir: str) -> list[dict]:
    """The log of TRL's trainer, set up as its script does."""
    import importlib

    import trl
    from datasets import load_dataset

    parser = importlib.import_module(f"trl.scripts.{script}").make_parser()
    script_args, training_args, model_args, _ = parser.parse_args_and_config(
        ["--config", file, "--output_dir", output_dir]
    )
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    trainer = getattr(trl, f"{script.upper()}Trainer")(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_dataset(script_args.dataset_name)["train"],
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


@pytest.mark.parametrize(
    ("script", "values", "rows"),
    [
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2], **MOVING}, 14),
        ("dpo", {"dataloader_drop_last": True, "train_sampling_strategy": "sequential"}, 13),
        (
            "dpo",
            {
                "dataloader_drop_last": True,
                "data_seed": 7,
                "optim": "adamw_torch",
                "max_grad_norm": 0.5,
            },
            11,
        ),
        (
            "kto",
            {
                "loss_type": "kto",
                "train_sampling_strategy": "sequential",
                "desirable_weight": 0.5,
                **MOVING,
            },
            16,
        ),
    ],
)
def test_the_same_file_gives_the_same_run(script, values, rows, workspace, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_pairs(data / "train.jsonl", rows, seed=3)
    if script == "kto":
        pairs = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
        unpaired = [
            {
                "prompt": pair["prompt"],
                "completion": pair["chosen" if i % 3 else "rejected"],
                "label": bool(i % 3),
            }
            for i, pair in enumerate(pairs)
        ]
        (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unpaired))
    shutil.copytree(workspace / "model", tmp_path / "model")
    content = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(data),
        **COMMON,
        **values,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    main(["train", "--config", str(file), "--output_dir", str(tmp_path / "ours")])
    ours = steps(tmp_path / "ours")
    expected = theirs(script, str(file), str(tmp_path / "theirs"))
    assert [line["step"] for line in ours] == [line["step"] for line in expected]
    assert len(ours) >= 5
    for mine, line in zip(ours, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert mine[key] == pytest.approx(line[key], rel=1e-5, abs=1e-9), (line["step"], key)
