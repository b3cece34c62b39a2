"""The same rows and weights through TRL's RewardTrainer: tokens, loss, gradients, metrics,
parameters; and the folder in transformers."""

import json

import pytest
import torch

from fasttr.config.reward_config import RewardConfig
from fasttr.training.reward import train_reward
from tests.runs import settings, steps, weights
from tests.trl_trainers import trl_arguments, trl_log

METRICS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "num_tokens",
    "min_reward",
    "mean_reward",
    "max_reward",
    "accuracy",
    "margin",
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rows_of(path, case):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        if case == "margin":
            row["margin"] = 0.3 * (i % 4)
        if case == "implicit prompt":
            prompt = row.pop("prompt")
            row["chosen"], row["rejected"] = prompt + row["chosen"], prompt + row["rejected"]
        if case == "chat":
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            for side in ("chosen", "rejected"):
                row[side] = [{"role": "assistant", "content": row[side]}]
    return rows


def with_padding(folder, target, chat=False):
    """The workspace's tokenizer with a padding token of its own, so that both read the same."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    if chat:
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(target)
    return tokenizer


def trl_run(model, tokenizer, rows, tmp_path, after_step=None, **changes):
    from datasets import Dataset
    from trl import RewardConfig as TrlConfig
    from trl import RewardTrainer

    common = {"max_length": 64, "learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 6}
    args = trl_arguments(
        TrlConfig,
        tmp_path / "trl",
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=4,
        **{**common, **changes},
    )
    trainer = RewardTrainer(
        model=str(model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trl_log(trainer, after_step)


def our_run(workspace, rows, tmp_path, **changes):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_name": str(data), "learning_rate": 0.0, "max_grad_norm": 0.0}
    out = tmp_path / "ours"
    train_reward(RewardConfig(**settings(workspace, out, **{**common, **changes})))
    return steps(out)


@pytest.fixture
def model(workspace, tmp_path):
    """The workspace's model with a chat template."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(workspace / "model").save_pretrained(folder)
    return folder, with_padding(workspace / "model", folder, chat=True)


@pytest.mark.parametrize("case", ["plain", "margin", "center", "implicit prompt", "chat", "short"])
def test_every_metric_is_trls(workspace, model, tmp_path, case):
    folder, tokenizer = model
    rows = rows_of(workspace / "train.jsonl", case)
    changes = {"center_rewards_coefficient": 0.1} if case == "center" else {}
    changes |= {"max_length": 50} if case == "short" else {}
    theirs = trl_run(folder, tokenizer, rows, tmp_path, **changes)
    ours = our_run(workspace, rows, tmp_path, model_name_or_path=str(folder), **changes)
    assert len(ours) == len(theirs) == 6
    assert len({line["accuracy"] for line in theirs}) > 1
    for mine, other in zip(ours, theirs, strict=True):
        for key in METRICS:
            bound = 1e-5 * max(1.0, abs(other[key]))
            assert abs(mine[key] - other[key]) <= bound, (key, mine[key], other[key])


def test_parameters_follow_trl_over_8_steps(workspace, model, tmp_path):
    """adam_epsilon is large: Adam amplifies differences of gradients near zero."""
    folder, tokenizer = model
    rows = rows_of(workspace / "train.jsonl", "margin")
    common = {
        "learning_rate": 1e-3,
        "max_steps": 8,
        "lr_scheduler_type": "cosine",
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1.0,
        "center_rewards_coefficient": 0.01,
    }
    theirs = {}

    def keep(step, trained):
        theirs[step] = {k: v.detach().clone() for k, v in trained.named_parameters()}

    trl_run(folder, tokenizer, rows, tmp_path, keep, **common)
    saving = {"save_strategy": "steps", "save_steps": 4}
    our_run(workspace, rows, tmp_path, model_name_or_path=str(folder), **common, **saving)
    for step in (4, 8):
        ours = weights(tmp_path / "ours" / f"checkpoint-{step}")
        assert ours.keys() == theirs[step].keys()
        for name, value in ours.items():
            assert (value - theirs[step][name]).abs().max() < 2e-6 * step + 1e-6, (step, name)
    moved = {k: float((theirs[8][k] - theirs[4][k]).abs().max()) for k in theirs[4]}
    assert moved["score.weight"] > 5e-4
    assert torch.isfinite(torch.tensor(list(moved.values()))).all()
