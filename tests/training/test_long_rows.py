"""Rows over the budget of tokens: in parts they give the run that has room for them."""

from __future__ import annotations

import pytest

from fasttr import Callback, TrainConfig, train
from fasttr.data.load import DataConfig, load_trees
from fasttr.models.load import load_tokenizer
from tests.distributed.cases import assert_same_numbers
from tests.runs import run, settings, steps

MOVING = {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 3}
BUDGET = 24  # less than nearly every pair of the workspace, and than many single completions
CASES = {
    "soft": {**MOVING, "eval_strategy": "steps", "eval_steps": 3, "gradient_checkpointing": False},
    "ld_alpha": {"loss_type": "ipo", "ld_alpha": 0.4, "ref_update": "hard"},
    "weighed by the policy": {"use_weighting": True},
    "kto": {"loss_type": "kto", **MOVING, "eval_strategy": "steps", "eval_steps": 3},
    "list": {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.3]},
    "adapter": {**MOVING, "use_peft": True, "lora_r": 4},
    "padded": {"attention_tier": "padded"},
    "bf16": {"bf16": True, **MOVING},
}
QUICK = ("soft", "ld_alpha", "kto")


@pytest.mark.parametrize(
    "name",
    [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_run_of_long_rows_in_parts_is_the_run_of_whole_ones(
    workspace, tmp_path, monkeypatch, name
):
    common = {"adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "max_steps": 4}
    changes = {**common, **CASES[name]}
    if "eval_strategy" in changes:
        changes["eval_dataset_name"] = str(workspace / "test.jsonl")
    run(workspace, tmp_path / "whole", **changes, max_tokens_per_batch=8192)
    calls = Calls(monkeypatch)
    parts = settings(workspace, tmp_path / "parts", **changes, max_tokens_per_batch=BUDGET)
    train(TrainConfig(**parts), callbacks=[calls])
    assert_same_numbers(tmp_path / "whole", tmp_path / "parts", name)
    # Over the budget is what cannot be cut, one completion with its prompt.
    over = [sequences for tokens, sequences in calls.found if tokens > BUDGET]
    assert set(over) == {1}
    assert len(over) < len(calls.found)
    if name == "soft":
        assert steps(tmp_path / "parts")[0]["ref/distance"] == 0.0


class Calls(Callback):
    """Tokens and sequences of every call of the layers, from when the model has been checked."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.found = []

    def on_train_begin(self, run):
        inputs = run.policy.rows.inputs

        def watched(tokens):
            queries, _ = tokens.attention.lengths()
            self.found.append((sum(queries), len(queries)))
            return inputs(tokens)

        self.monkeypatch.setattr(run.policy.rows, "inputs", watched)


def test_the_log_says_how_many_rows_go_in_parts(workspace, tmp_path, capsys):
    run(workspace, tmp_path, max_tokens_per_batch=BUDGET, max_steps=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "rows are over max_tokens_per_batch 24: they go through the layers in parts" in said
    data = DataConfig(str(workspace / "train.jsonl"), max_length=64)
    trees = load_trees(load_tokenizer(str(workspace / "model")), data)
    longest = max(len(tree.prompt_ids) + sum(map(len, tree.completions)) for tree in trees)
    assert f"the longest has {longest} tokens" in said
