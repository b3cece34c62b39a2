"""Samples of a policy, judged: their gold reward, and their distance from the initial policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from fasttr.batch import Tree
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.toy.judge import Mean, judge, sample
from fasttr.toy.task import gold_reward
from tests.tiny import alone_logps

PROMPTS = ["write 12 of bdf:", "write 08 of abc:", "write 16 of jkl:"]


def test_a_mean_has_the_standard_error_of_its_rows():
    mean = Mean.of(np.array([1.0, 2.0, 6.0]))
    assert mean.value == 3.0
    assert mean.stderr == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))


def test_samples_are_judged_by_their_own_log_probs_under_both_models(workspace):
    """KL(policy || initial): how much likelier the policy's samples are to the policy."""
    policy, initial = workspace / "model", workspace / "reference"
    judged = judge(policy, initial, PROMPTS, seed=3)
    model, tokenizer = load_model(ModelConfig(str(policy))), load_tokenizer(str(policy))
    drawn = sample(model, tokenizer, PROMPTS, seed=3)
    trees = [Tree(row, prompt, (ids,)) for row, (prompt, ids) in enumerate(drawn)]
    own, others = (
        alone_logps(AutoModelForCausalLM.from_pretrained(folder), trees).detach().numpy()
        for folder in (policy, initial)
    )
    assert judged.kl.value == pytest.approx((own - others).mean(), abs=1e-4)
    assert abs(judged.kl.value) > 0.01
    gold = [gold_reward(*pair) for pair in zip(PROMPTS, judged.completions, strict=True)]
    assert judged.gold.value == pytest.approx(np.mean(gold))
    assert judged.length == np.mean([len(text) for text in judged.completions])
