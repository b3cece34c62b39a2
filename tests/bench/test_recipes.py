"""The recipes for a GPU load, and take a step on rows like theirs."""

from __future__ import annotations

import json

import pytest

from fasttr.cli.train import parse_train
from fasttr.reference.schedule import Hard, Soft
from fasttr.training.loop import train
from tests.places import ROOT
from tests.runs import lines

ALL = sorted((ROOT / "fasttr" / "recipes").glob("*.yaml"))
# Those of corrected reward models are in test_ocrm_recipes.
RECIPES = [one for one in ALL if not one.stem.startswith(("pythia-1b", "qwen2.5-1.5b"))]


def rows_like(name: str) -> list[dict]:
    """Rows in the shape of the data set that a recipe names."""
    if "hh" in name:
        asked = "\n\nHuman: how many{}?\n\nAssistant:"
        return [
            {"chosen": asked.format(i) + " many of them", "rejected": asked.format(i) + " no"}
            for i in range(8)
        ]
    if "tldr" in name:
        asked = "SUBREDDIT: r/x\n\nPOST: it was {}\n\nTL;DR:"
        return [
            {"prompt": asked.format(i), "chosen": " short", "rejected": " much longer"}
            for i in range(8)
        ]
    user = [{"content": "how many?", "role": "user"}]
    answers = (("chosen", "two"), ("rejected", "no"))
    sides = {side: [*user, {"content": text, "role": "assistant"}] for side, text in answers}
    return [
        {
            "prompt": "how many?",
            "prompt_id": str(i),
            **sides,
            "messages": sides["chosen"],
            "score_chosen": 8.0,
            "score_rejected": 4.0,
        }
        for i in range(8)
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_takes_a_step(recipe, workspace, tmp_path):
    config = parse_train(["--config", str(recipe)])
    assert config.output_dir == f"runs/{recipe.stem}"
    assert (config.max_length, config.max_grad_norm, config.num_train_epochs) == (1024, 2.0, 1.0)
    if config.loss_type != "sft":
        assert (config.beta, config.learning_rate, config.warmup_steps) == (0.05, 1e-6, 100)
        assert config.ref_update == {"dpo": "none", "oft": "soft", "ard": "hard"}[recipe.stem[-3:]]
    if "pythia" in recipe.stem and config.ref_update != "none":
        assert config.schedule in (Soft(0.6, 64), Hard(512))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_like(recipe.stem)))
    stand_in = {
        "model_name_or_path": workspace / "model",
        "dataset_name": file,
        "eval_dataset_name": file,
        "dataset_train_split": "train",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "train_batch_size": 4,
        "use_cpu": "true",
        "bf16": "false",
        "warmup_steps": 0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "disable_tqdm": "true",
        "save_strategy": "no",
    }
    train(
        parse_train(
            ["--config", str(recipe), *(f"--{key}={value}" for key, value in stand_in.items())]
        )
    )
    assert [line["eval_loss"] for line in lines(tmp_path / "run") if line.get("eval_loss")][-1] > 0


def test_recipes_cover_the_study():
    assert len(RECIPES) == 11
    for recipe in RECIPES:
        if not recipe.stem.endswith("sft"):
            for flags in (
                ["--loss_type", "ipo_sum"],
                ["--loss_type", "kto_paired", "--group_size", "8"],
            ):
                parse_train(["--config", str(recipe), *flags])
