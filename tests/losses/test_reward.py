"""Losses of scores against their equations, typed again in numpy."""

import math

import numpy as np
import pytest
import torch

from fasttr.losses.reward import RewardInputs, accuracy, reward_loss

PAIRS = np.array([[0.7, -0.4], [-1.2, 0.9], [2.0, 1.5]])
RANKED = np.array([[1.5, 0.2, -0.3, 0.9], [-0.6, 0.1, 2.0, 0.4]])


def loss_of(scores, center=None, margin=None):
    margin = None if margin is None else torch.tensor(margin, dtype=torch.float64)
    inputs = RewardInputs(torch.tensor(scores).reshape(-1), scores.shape[1], margin)
    return reward_loss(scores.shape[1], center)(inputs).numpy()


def test_bradley_terry_with_margin_and_centring():
    margin = np.array([0.3, 0.0, -0.2])
    difference = PAIRS[:, 0] - PAIRS[:, 1] - margin
    wanted = np.log1p(np.exp(-difference)) + 0.1 * (PAIRS[:, 0] + PAIRS[:, 1]) ** 2
    np.testing.assert_allclose(loss_of(PAIRS, 0.1, margin), wanted, rtol=1e-12)


def test_plackett_luce_is_the_log_probability_of_the_order():
    wanted = []
    for row in RANKED:
        probability = 1.0
        for i in range(len(row)):
            probability *= math.exp(row[i]) / sum(math.exp(r) for r in row[i:])
        wanted.append(-math.log(probability))
    np.testing.assert_allclose(loss_of(RANKED), wanted, rtol=1e-12)


def test_plackett_luce_probabilities_of_all_orders_add_up_to_one():
    from itertools import permutations

    orders = np.array(list(permutations(RANKED[0])))
    assert math.isclose(np.exp(-loss_of(orders)).sum(), 1.0, rel_tol=1e-12)


def test_two_ranks_are_bradley_terry():
    from fasttr.losses.reward import PlackettLuce

    inputs = RewardInputs(torch.tensor(PAIRS).reshape(-1))
    np.testing.assert_allclose(PlackettLuce()(inputs).numpy(), loss_of(PAIRS), rtol=1e-12)


def test_accuracy_counts_pairs_of_ranks():
    # Of six pairs of the first row 1.5 > all (3), 0.2 > -0.3 (1), and nothing else.
    found = accuracy(torch.tensor(RANKED)).tolist()
    assert found == pytest.approx([4 / 6, 1 / 6])
    assert accuracy(torch.tensor([[1.0, 1.0]])).item() == 0
