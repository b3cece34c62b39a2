"""The exact toy: its parts against enumeration, and the bands in which its arms end."""

import itertools
import math

import numpy as np
import pytest
import torch

from fasttr.losses.ratios import RELEASE, RatioSettings, pair_weights
from fasttr.losses.reward import RewardInputs, reward_loss
from fasttr.toy import exact
from fasttr.toy.exact import COUNTS, FEATURES, GOLDS, SFT_LOGP, Settings, run

SEEDS = range(10)


@pytest.fixture(scope="module")
def saturating():
    return {arm: [run(arm, seed) for seed in SEEDS] for arm in exact.ARMS}


def finals(runs):
    return np.array([stages[-1].gold for stages in runs])


def test_probabilities_of_counts_are_sums_over_texts():
    """All 4^8 texts would be many: those of three letters."""
    by_count = {}
    for text in itertools.product(range(4), repeat=3):
        key = tuple(text.count(letter) for letter in range(4))
        probability = math.prod(exact.PROBABILITIES[letter] for letter in text)
        by_count[key] = by_count.get(key, 0.0) + probability
    counts = exact.all_counts(3)
    found = np.exp(exact.logp_of_counts(counts))
    assert len(counts) == len(by_count) == 20
    wanted = [by_count[tuple(count)] for count in counts.tolist()]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_there_are_165_counts_and_their_probabilities_add_up():
    assert len(COUNTS) == 165
    assert np.exp(SFT_LOGP).sum() == pytest.approx(1.0, abs=1e-12)
    assert np.exp(SFT_LOGP) @ GOLDS["saturating"] == pytest.approx(1.37, abs=0.005)


def test_the_fit_is_where_the_gradient_of_the_reward_loss_is_zero():
    rng = np.random.default_rng(0)
    pairs = exact.draw_pairs(rng, SFT_LOGP, GOLDS["interaction"], 500)
    weights = rng.uniform(0.2, 3, 500)
    theta = torch.from_numpy(exact.fit_reward(pairs, weights)).requires_grad_(True)
    scores = (torch.from_numpy(FEATURES)[torch.from_numpy(pairs)] @ theta).reshape(-1)
    losses = reward_loss(2)(RewardInputs(scores))
    total = (torch.from_numpy(weights) * losses).sum() + exact.RIDGE / 2 * (theta**2).sum()
    (gradient,) = torch.autograd.grad(total, theta)
    assert float(gradient.abs().max()) < 1e-7
    assert float(theta.detach().abs().min()) > 1e-2


def test_the_excess_loss_is_zero_for_a_reward_that_is_the_gold():
    theta = np.array([0.8, -0.3, 0.35])
    found = exact.loss_under(SFT_LOGP, theta, GOLDS["well-specified"])
    assert found.excess == pytest.approx(0, abs=1e-12)
    assert found.accuracy == pytest.approx(1)
    other = exact.loss_under(SFT_LOGP, theta, GOLDS["saturating"])
    assert other.excess > 0.01
    assert 0.6 < other.accuracy < 1


def test_all_weights_are_one_at_the_first_stage(saturating):
    for runs in saturating.values():
        assert runs[0][0].effective_size == pytest.approx(20_000)
        np.testing.assert_allclose(runs[0][0].theta, saturating["fixed"][0][0].theta, rtol=1e-9)


def test_one_reward_model_is_optimised_past_the_gold(saturating):
    assert finals(saturating["fixed"]).mean() < -0.6
    best = max(np.mean([stages[i].gold for stages in saturating["fixed"]]) for i in range(15))
    assert best > 1.8


def test_weights_keep_the_gold_reward_near_that_of_new_labels(saturating):
    assert 2.35 < finals(saturating["weighted"]).mean() < 2.56
    assert 2.50 < finals(saturating["fresh"]).mean() < 2.56


def test_weights_beat_one_reward_model_at_its_best_beta_in_every_seed(saturating):
    oracle = [
        exact.best_single_stage(stages[0].theta, GOLDS["saturating"])
        for stages in saturating["fixed"]
    ]
    assert 1.95 < np.mean(oracle) < 2.01
    assert (finals(saturating["weighted"]) - oracle).min() > 0.2


def test_the_same_weights_dealt_out_at_random_do_not_help(saturating):
    assert finals(saturating["shuffled"]).mean() < 0


def test_the_weighted_fit_has_less_loss_where_the_policy_is(saturating):
    excess = []
    for seed in SEEDS:
        policy = saturating["weighted"][seed][7].logp
        pairs = exact.draw_pairs(np.random.default_rng(seed), SFT_LOGP, GOLDS["saturating"], 20_000)
        weights = pair_weights(policy[pairs], SFT_LOGP[pairs], RatioSettings(min_ess=0.0)).weights
        fits = (exact.fit_reward(pairs, np.ones(20_000)), exact.fit_reward(pairs, weights))
        excess.append([exact.loss_under(policy, f, GOLDS["saturating"]).excess for f in fits])
    plain, weighted = np.mean(excess, axis=0)
    assert weighted < 0.6 * plain
    assert plain > 0.2


def test_the_released_exponent_is_the_fixed_reward_model(saturating):
    released = [run("weighted", seed, Settings(stages=12, ratios=RELEASE))[-1] for seed in range(3)]
    fixed = [stages[11].gold for stages in saturating["fixed"][:3]]
    assert np.mean([stage.gold for stage in released]) == pytest.approx(np.mean(fixed), abs=0.05)
    assert released[0].effective_size > 19_000


def test_a_reward_model_that_can_be_right_gains_nothing_and_spreads():
    settings = Settings(gold="well-specified")
    fixed = finals([run("fixed", seed, settings) for seed in range(6)])
    weighted = finals([run("weighted", seed, settings) for seed in range(6)])
    assert fixed.mean() == pytest.approx(5.90, abs=0.03)
    assert weighted.std() > 4 * fixed.std()
    assert abs(weighted.mean() - fixed.mean()) < 0.6
