"""Stages on a pool of samples: drawn here from the task's own distribution, without a model."""

import numpy as np
import pytest

from bench.paper.ocrm_pool import Pool, Settings, bag_of, draw_pairs, run, study, table, verdict
from fasttr.toy.task import base_completion, gold_reward, prompts

SETTINGS = Settings(seeds=3, pairs=2400, prompts=40, samples=150)


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    asked = prompts(SETTINGS.prompts, 1)
    texts = [
        (p, base_completion(p, rng, tail=0.15)) for p in asked for _ in range(SETTINGS.samples)
    ]
    shape = (SETTINGS.prompts, SETTINGS.samples)
    gold = np.array([gold_reward(p, t) for p, t in texts]).reshape(shape)
    bag = np.array([bag_of(p, t) for p, t in texts], dtype=float).reshape(*shape, 2)
    return Pool(gold, {"bag": bag})


def test_labels_are_bradley_terry_on_the_gold_reward(pool):
    start = np.full(pool.gold.shape, -np.log(SETTINGS.samples))
    pairs = draw_pairs(np.random.default_rng(0), start, pool.gold, SETTINGS)
    first, second = (pool.gold[pairs[:, 0], pairs[:, side]] for side in (1, 2))
    margin = np.abs(first - second) / SETTINGS.noise
    wanted = (1 / (1 + np.exp(-margin))).mean()
    is_right = np.where(first == second, 0.5, first > second)
    assert is_right.mean() == pytest.approx(wanted, abs=0.03)


def test_pairs_follow_the_policy(pool):
    tilted = 5 * pool.gold
    tilted -= np.logaddexp.reduce(tilted, axis=1, keepdims=True)
    pairs = draw_pairs(np.random.default_rng(0), tilted, pool.gold, SETTINGS)
    mean = pool.gold[pairs[:, :1], pairs[:, 1:]].mean()
    assert mean == pytest.approx((np.exp(tilted) * pool.gold).sum(axis=1).mean(), abs=0.02)


def test_weights_help_a_reward_that_cannot_know_the_length(pool):
    """And the same weights dealt out at random do not."""
    ends = {
        arm: np.mean([run(pool, "bag", arm, seed, SETTINGS).gold[-1] for seed in range(3)])
        for arm in ("fixed", "weighted", "shuffled", "fresh")
    }
    assert ends["weighted"] > ends["fixed"] + 0.1
    assert ends["weighted"] > ends["shuffled"] + 0.1
    assert ends["fresh"] > ends["fixed"] + 0.1


def test_the_first_stage_is_the_same_for_all(pool):
    firsts = {
        arm: run(pool, "bag", arm, 0, SETTINGS).gold[:2]
        for arm in ("fixed", "weighted", "shuffled", "fresh")
    }
    for found in firsts.values():
        assert found == pytest.approx(firsts["fixed"])
    assert firsts["fixed"][1] != firsts["fixed"][0]


def test_the_table_and_the_verdict_name_every_arm(pool):
    found = study(pool, SETTINGS)
    assert table(found, SETTINGS).count("\n") == 1 + 4
    said = verdict(found)
    assert len(said) == 6
    assert said[0].startswith("bag, weighted: ")
