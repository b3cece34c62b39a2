"""The model card in every saved folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.runs import evaluations, run


def metadata(folder: Path) -> dict:
    _, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head)


@pytest.fixture(scope="module")
def saved(workspace, tmp_path_factory) -> Path:
    return run(
        workspace,
        tmp_path_factory.mktemp("card") / "my-model",
        ref_update="soft",
        ref_update_every=2,
        beta=0.25,
        save_strategy="steps",
        save_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset_name=str(workspace / "test.jsonl"),
    ).output_dir


def test_every_saved_folder_says_where_it_comes_from(saved):
    for folder, step in ((saved / "checkpoint-3", 3), (saved, 6)):
        text = (folder / "README.md").read_text()
        assert text.count("# my-model\n") == 1
        assert f"with the loss sigmoid on {saved.parent.parent}"[:20] in text
        assert f"to step {step} of 6" in text
        assert "| beta | 0.25 |" in text
        assert "read 24 rows" in text
    assert "The reference moved every 2 steps (soft, to 0.6 of the policy), 3 times so far" in text


def test_it_has_the_numbers_of_the_last_evaluation(saved):
    margin = evaluations(saved)[-1]["eval_anchor/rewards/margins"]
    assert f"| eval_anchor/rewards/margins | {margin:.4g} +- " in (saved / "README.md").read_text()


def test_the_hub_is_told_names_of_its_own_alone(saved):
    assert metadata(saved) == {"library_name": "transformers", "tags": ["fasttr", "sigmoid"]}


def test_a_hub_model_is_named_as_the_base(saved, workspace):
    from types import SimpleNamespace

    from fasttr import TrainConfig
    from fasttr.training.card import hub_metadata

    config = TrainConfig(
        model_name_or_path="some/model", dataset_name="a/set", use_peft=True, loss_type="ipo"
    )
    lines = hub_metadata(SimpleNamespace(config=config))
    assert yaml.safe_load("\n".join(lines)) == {
        "library_name": "peft",
        "tags": ["fasttr", "ipo"],
        "base_model": "some/model",
        "datasets": ["a/set"],
    }


def test_the_best_checkpoint_brings_its_own_card(workspace, tmp_path):
    folder = run(
        workspace,
        tmp_path / "best",
        max_steps=2,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        eval_dataset_name=str(workspace / "test.jsonl"),
    ).output_dir
    best = min(evaluations(folder), key=lambda line: line["eval_loss"])["step"]
    assert f"to step {best} of 2" in (folder / "README.md").read_text()
