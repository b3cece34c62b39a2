"""What the tests of several processes compare with."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr.models.scratch import init_model
from tests.distributed.cases import CASES, case_settings
from tests.runs import run
from tests.tiny import perturb, tiny_model


@pytest.fixture(scope="session")
def models(workspace):
    """The workspace with two models more: one whose head is its embedding, one with experts."""
    experts = workspace / "experts"
    if not experts.exists():
        tiny_model("qwen3_moe", vocab_size=300).save_pretrained(experts)
        AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(experts)
    folder = workspace / "tied"
    if not folder.exists():
        init_model(
            "qwen3",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            vocab_size=300,
            tokenizer_data=workspace / "train.jsonl",
            output_dir=folder,
            tie_word_embeddings=True,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        perturb(model, 0.2, seed=7)
        model.save_pretrained(folder)
    return workspace


@pytest.fixture(scope="session")
def one(models, tmp_path_factory):
    """The runs of one process, each made when it is asked for."""
    folder = tmp_path_factory.mktemp("one")
    made = set()

    def of_case(name):
        if name not in made:
            changes = case_settings(models, folder, name)
            del changes["output_dir"]
            run(models, folder / name, **changes)
            made.add(name)
        return folder / name

    assert set(CASES)
    return of_case
