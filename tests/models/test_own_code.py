"""A model whose folder brings its code: run only where asked to, in a tier that is exact for it."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr.errors import FasttrError
from fasttr.models.load import load_config
from tests.models import own_model
from tests.models.own_model import OwnConfig, OwnForCausalLM
from tests.runs import run, steps


@pytest.fixture
def own_folder(workspace, tmp_path):
    folder = tmp_path / "own"
    torch.manual_seed(3)
    model = OwnForCausalLM(OwnConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.config.auto_map = {
        "AutoConfig": "own_model.OwnConfig",
        "AutoModelForCausalLM": "own_model.OwnForCausalLM",
    }
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(folder)
    shutil.copy(str(own_model.__file__), folder)
    return folder


def test_code_is_run_only_where_it_is_trusted(own_folder):
    with pytest.raises(FasttrError, match="trust_remote_code"):
        load_config(str(own_folder))


def test_log_probs_and_gradient_are_those_of_its_own_forward(
    workspace, tmp_path, own_folder, capsys
):
    run(
        workspace,
        tmp_path / "out",
        model_name_or_path=str(own_folder),
        trust_remote_code=True,
        train_batch_size=24,
        learning_rate=0.0,
        max_grad_norm=0.0,
        max_steps=1,
    )
    assert "attention_tier: padded (" in capsys.readouterr().out
    logged = steps(tmp_path / "out")[0]

    model = AutoModelForCausalLM.from_pretrained(own_folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(own_folder)
    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    chosen = torch.stack([_logp(model, tokenizer, row["prompt"], row["chosen"]) for row in rows])
    rejected = torch.stack(
        [_logp(model, tokenizer, row["prompt"], row["rejected"]) for row in rows]
    )
    assert logged["logps/chosen"] == pytest.approx(float(chosen.detach().mean()), rel=1e-5)
    assert logged["logps/rejected"] == pytest.approx(float(rejected.detach().mean()), rel=1e-5)
    # The reference is the policy: DPO's gradient is -beta/2 that of the mean difference.
    (-0.05 * (chosen - rejected).mean()).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert logged["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def _logp(model, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    start = len(tokenizer(prompt).input_ids)
    ids = torch.tensor([tokenizer(prompt + completion + tokenizer.eos_token).input_ids])
    logits = model(ids).logits[0, start - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, ids[0, start:, None]).sum()
