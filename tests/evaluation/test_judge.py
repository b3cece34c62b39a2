"""What the judge of all methods says of a policy, typed again from the samples that it draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fasttr.evaluation.judge import JudgeSettings, draw_rollout, judge, label_pairs
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.rollouts.prompts import encode

ROWS = [
    {"prompt": "alpha beta?", "response": "a delta"},
    {"prompt": "gamma?", "response": "eee"},
    {"prompt": "delta epsilon?", "response": "xyz"},
    {"prompt": "zeta eta theta?", "response": "u"},
]
M, TEMPERATURE, NOISE = 3, 0.7, 0.5


class Scored:
    """A source of rewards that keeps what it was asked."""

    def __init__(self, name, score):
        self.name = name
        self.score = score
        self.asked = []

    def __call__(self, inputs):
        self.asked.append(inputs)
        return np.array([self.score(text) for text in inputs.rollout.texts])


def vowels(text):
    return sum(text.count(vowel) for vowel in "aeiou") / 2


def odd(text):
    """A score that is right now and then."""
    return sum(map(ord, text)) % 7 / 3


@pytest.fixture(scope="module")
def judged(workspace):
    """What is found of a policy, its rollout, and the log-probs of both models."""
    policy, initial = (str(workspace / name) for name in ("model", "reference"))
    tokenizer = load_tokenizer(policy)
    prompts, _ = encode(tokenizer, ROWS, "rows", None)
    settings = JudgeSettings(M, 60, TEMPERATURE, 2, 5, NOISE, 256)
    models = [load_model(ModelConfig(name)) for name in (policy, initial)]
    gold = Scored("gold", vowels)
    found = judge(*models, tokenizer, prompts, gold, settings, {"odd": Scored("odd", odd)})
    rollout = draw_rollout(models[0], tokenizer, prompts, settings)
    logps = [alone_logps(name, rollout) for name in (policy, initial)]
    return found, rollout, logps, gold, tokenizer


def alone_logps(name, rollout):
    """(B, m) of each completion alone, of the distribution that it is drawn from."""
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    sums = []
    for tree in rollout.trees:
        for ids in tree.completions:
            whole = torch.from_numpy(np.concatenate([tree.prompt_ids, ids])).long()[None]
            with torch.no_grad():
                logits = model(whole).logits[0, len(tree.prompt_ids) - 1 : -1] / TEMPERATURE
            logp = logits.log_softmax(-1).gather(1, whole[0, -len(ids) :, None])
            sums.append(float(logp.sum()))
    return np.array(sums).reshape(-1, M)


def assert_mean(found, name, values_Bm):
    """Of prompts, whose samples count as one."""
    of_prompts = np.mean(values_Bm, axis=1)
    stderr = of_prompts.std(ddof=1) / math.sqrt(len(of_prompts))
    assert found.metrics[name] == pytest.approx(of_prompts.mean(), abs=1e-4)
    assert found.metrics[f"{name}_stderr"] == pytest.approx(stderr, abs=1e-4)


def test_the_kl_is_of_the_distributions_that_samples_are_drawn_from(judged):
    found, _, (own, initial), _, _ = judged
    assert_mean(found, "kl", own - initial)
    assert abs(found.metrics["kl"]) > 0.05


def test_gold_length_and_wins_are_means_over_prompts(judged):
    found, rollout, _, _, _ = judged
    gold = np.array([vowels(text) for text in rollout.texts]).reshape(-1, M)
    assert_mean(found, "gold", gold)
    np.testing.assert_allclose(found.gold_B, gold.mean(axis=1))
    assert_mean(found, "length", rollout.lengths.reshape(-1, M))
    assert np.ptp(rollout.lengths) > 5
    theirs = np.array([vowels(row["response"]) for row in ROWS])
    wins = gold > theirs[:, None]
    assert_mean(found, "win_rate", wins)
    assert 0 < wins.mean() < 1


def test_responses_are_scored_as_if_they_had_been_drawn(judged):
    """A reward model reads their ids, so they have to be those of the text, EOS included."""
    _, _, _, gold, tokenizer = judged
    (responses,) = (asked for asked in gold.asked if asked.m == 1)
    for row, tree in zip(ROWS, responses.rollout.trees, strict=True):
        (ids,) = tree.completions
        assert tokenizer.decode(ids) == row["response"] + tokenizer.eos_token
        assert tokenizer.decode(tree.prompt_ids, skip_special_tokens=True) == row["prompt"]


def test_a_reward_model_is_measured_on_pairs_of_samples_that_differ(judged):
    found, rollout, _, _, _ = judged
    right, excess = [], []
    for number in range(len(ROWS)):
        texts = rollout.texts[number * M : (number + 1) * M]
        of_prompt = []
        for a, b in itertools.combinations(texts, 2):
            margin, by_gold = odd(a) - odd(b), vowels(a) - vowels(b)
            if by_gold == 0:
                continue
            better = 1 / (1 + math.exp(-by_gold / NOISE))
            loss, least = (
                -better * math.log(1 / (1 + math.exp(-x)))
                - (1 - better) * math.log(1 / (1 + math.exp(x)))
                for x in (margin, by_gold / NOISE)
            )
            of_prompt.append((margin * by_gold > 0, loss - least))
        if of_prompt:
            right.append(np.mean([one for one, _ in of_prompt]))
            excess.append(np.mean([one for _, one in of_prompt]))
    assert found.metrics["odd/accuracy"] == pytest.approx(np.mean(right))
    assert found.metrics["odd/excess_loss"] == pytest.approx(np.mean(excess))
    assert 0 < np.mean(right) < 1


def test_what_has_no_reward_has_no_label():
    rng = np.random.default_rng(0)
    first, second = np.array([1.0, np.nan, 2.0]), np.array([0.0, 1.0, np.nan])
    for noise in (0, 0.5):
        _, labelled = label_pairs(first, second, noise, rng)
        assert labelled.tolist() == [True, False, False]
