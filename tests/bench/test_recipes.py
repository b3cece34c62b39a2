"""The recipes for a GPU load, and take a step on rows like theirs."""

from __future__ import annotations

import json
import re

import pytest

from fasttr.cli.train import parse_train
from fasttr.cluster.report import report
from fasttr.cluster.settings import PlanSettings
from fasttr.reference.schedule import Hard, Soft
from fasttr.training.loop import train
from tests.places import ROOT
from tests.runs import lines

ALL = sorted((ROOT / "fasttr" / "recipes").glob("*.yaml"))
# Those of corrected reward models are in test_ocrm_recipes.
RECIPES = [one for one in ALL if not one.stem.startswith(("pythia-1b", "qwen2.5-1.5b-alpaca"))]


def is_small(recipe) -> bool:
    """For one GPU of 24 GB; the others have the TR paper's settings."""
    return "qwen" in recipe.stem


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
    if "kto" in name:
        return [
            {"prompt": f"how many {i}?", "completion": " two", "label": i % 2 == 0}
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
    assert (config.max_length, config.num_train_epochs) == (1024, 1.0)
    assert config.max_grad_norm == (1.0 if is_small(recipe) else 2.0)
    if config.loss_type != "sft" and not is_small(recipe):
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
        "log_completions_tokens": 2,
        **({"group_size": 2} if "kto" in recipe.stem else {}),
    }
    train(
        parse_train(
            ["--config", str(recipe), *(f"--{key}={value}" for key, value in stand_in.items())]
        )
    )
    assert [line["eval_loss"] for line in lines(tmp_path / "run") if line.get("eval_loss")][-1] > 0


def test_small_recipes_reach_from_half_a_billion_to_three_with_all_weights_and_with_lora():
    small = [parse_train(["--recipe", recipe.stem]) for recipe in RECIPES if is_small(recipe)]
    sizes = {config.model_name_or_path.split("-")[1] for config in small}
    assert sizes == {"0.5B", "1.5B", "3B"}
    assert {config.use_peft for config in small} == {True, False}
    assert {config.ref_update for config in small} == {"none", "soft", "hard"}


def test_recipes_cover_the_study():
    of_the_paper = [recipe for recipe in RECIPES if not is_small(recipe)]
    assert len(of_the_paper) == 11
    for recipe in of_the_paper:
        if not recipe.stem.endswith("sft"):
            for flags in (
                ["--loss_type", "ipo_sum"],
                ["--loss_type", "kto_paired", "--group_size", "8"],
            ):
                parse_train(["--config", str(recipe), *flags])


# The published shapes of Qwen2.5: hidden size, layers, inner size, heads.
SHAPES = {"0.5b": (896, 24, 4864, 14), "1.5b": (1536, 28, 8960, 12), "3b": (2048, 36, 11008, 16)}


@pytest.mark.parametrize(
    ("size", "row"), [("0.5b", "one card"), ("1.5b", "one card"), ("3b", "LoRA")]
)
def test_a_small_recipe_needs_the_memory_that_it_states(size, row, tmp_path):
    hidden, layers, inner, heads = SHAPES[size]
    file = tmp_path / "config.json"
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    file.write_text(json.dumps(config))
    recipe = next(one for one in RECIPES if f"-{size}-ultrafeedback" in one.stem)
    stated = float(re.search(r"it fits from (\d+) GiB", recipe.read_text())[1])

    def fits(memory: float) -> bool:
        asked = PlanSettings(model=str(file), memory_gib=memory, train_batch_size=32, lora_r=32)
        (line,) = [line for line in report(asked).splitlines() if line.startswith(row)]
        return "does not fit" not in line

    assert fits(stated)
    assert not fits(stated / 2)
