"""Density ratios against enumeration, closed forms and the released formula."""

import itertools
import math

import numpy as np
import pytest

from fasttr.errors import FasttrError
from fasttr.losses.ratios import (
    RELEASE,
    RatioSettings,
    effective_size,
    log_relative,
    pair_weights,
    prefix_sums,
    tau_for,
)

RNG = np.random.default_rng(0)
P = RNG.normal(-20, 4, (50, 2))
Q = P + RNG.normal(0, 1.5, (50, 2))


def sequence_logps(seed):
    """log-probs of all 27 texts of three letters out of three, of a policy that looks back."""
    rng = np.random.default_rng(seed)
    first, then = rng.dirichlet([1, 1, 1]), rng.dirichlet([1, 1, 1], size=3)
    texts = itertools.product(range(3), repeat=3)
    return np.log([first[a] * then[a, b] * then[b, c] for a, b, c in texts])


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7, 1.0])
def test_the_mean_weight_is_one_by_enumeration(alpha):
    p, q = sequence_logps(1), sequence_logps(2)
    assert abs(np.exp(p).sum() - 1) < 1e-12
    mixture = alpha * np.exp(p) + (1 - alpha) * np.exp(q)
    weight = np.exp(log_relative(p, q, alpha))
    assert (mixture * weight).sum() == pytest.approx(1.0, abs=1e-12)
    assert weight.std() > 0.05 or alpha == 1
    if alpha > 0:
        assert weight.max() <= 1 / alpha + 1e-12


def test_equal_policies_weigh_every_pair_alike():
    found = pair_weights(P, P, RatioSettings())
    np.testing.assert_allclose(found.weights, 1.0, rtol=0, atol=1e-14)
    assert found.effective_size == pytest.approx(50, rel=1e-12)
    assert found.tau == 1.0


def test_sides_may_be_swapped():
    settings = RatioSettings(min_ess=0.0)
    swapped = pair_weights(P[:, ::-1], Q[:, ::-1], settings)
    np.testing.assert_allclose(swapped.weights, pair_weights(P, Q, settings).weights, rtol=1e-14)


def test_the_weights_typed_again():
    alpha, tau, clip = 0.2, 0.6, 1.5
    ratio = np.exp(P) / (alpha * np.exp(P) + (1 - alpha) * np.exp(Q))
    weight = np.minimum(ratio.prod(axis=1), math.exp(clip)) ** tau
    found = pair_weights(P, Q, RatioSettings(alpha, tau, 0.0, clip))
    np.testing.assert_allclose(found.weights, weight / weight.mean(), rtol=1e-10)
    assert found.effective_size == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert found.largest_share == pytest.approx(weight.max() / weight.sum())


def test_the_released_formula_where_it_does_not_underflow():
    """fp32, a floor of 1e-36 and no scaling, as the released code has it."""
    near = np.float32(-15), np.float32(-10)
    p = RNG.uniform(*near, (40, 2)).astype(np.float32)
    q = RNG.uniform(*near, (40, 2)).astype(np.float32)
    mixture = np.float32(0.1) * np.exp(p) + np.float32(0.9) * np.exp(q)
    log_ratio = p - np.log(mixture + np.float32(1e-36))
    released = np.exp(np.float32(0.001) * log_ratio.sum(axis=1))
    ours = pair_weights(p, q, RELEASE).weights
    np.testing.assert_allclose(ours, released / released.mean(), rtol=2e-6)
    assert np.ptp(ours) > 1e-3


@pytest.mark.parametrize("depth", [-300.0, -3000.0])
def test_long_completions_stay_finite_where_the_released_formula_does_not_see_the_writer(depth):
    p = np.full((4, 2), depth)
    q = p + np.array([[0.0, 0.0], [2.0, 0.0], [-2.0, 1.0], [30.0, -40.0]])
    found = log_relative(p, q, 0.1)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], 0.0, atol=1e-12)
    with np.errstate(under="ignore"):
        mixture = np.float32(0.1) * np.exp(np.float32(p)) + np.float32(0.9) * np.exp(np.float32(q))
    assert (mixture == 0).all()
    assert np.isfinite(pair_weights(p, q, RatioSettings()).weights).all()


def test_effective_size_of_equal_weights_and_of_one():
    assert effective_size(np.full(7, -500.0)) == pytest.approx(7)
    assert effective_size(np.array([0.0, -800.0, -900.0])) == pytest.approx(1)
    assert effective_size(np.log([1.0, 2.0, 3.0])) == pytest.approx(36 / 14)


def test_tau_hits_its_target_and_only_lowers():
    log_weight = log_relative(P, Q, 0.0).sum(axis=1)
    plain = effective_size(log_weight)
    assert plain < 20
    sizes = [effective_size(tau * log_weight) for tau in np.linspace(0, 1, 21)]
    assert all(a >= b for a, b in itertools.pairwise(sizes))
    tau = tau_for(log_weight, 30.0)
    assert 0 < tau < 1
    assert effective_size(tau * log_weight) == pytest.approx(30.0, abs=1e-6)
    assert tau_for(log_weight, plain - 1e-9) == 1.0
    found = pair_weights(P, Q, RatioSettings(alpha=0.0, min_ess=0.6))
    assert found.effective_size == pytest.approx(30.0, abs=1e-6)


def test_correlation_with_length():
    lengths = RNG.integers(3, 30, (50, 2))
    log_weight = log_relative(P, Q, 0.1).sum(axis=1)
    wanted = np.corrcoef(log_weight, lengths.sum(axis=1))[0, 1]
    found = pair_weights(P, Q, RatioSettings(), lengths).length_correlation
    assert found == pytest.approx(wanted)
    assert abs(found) > 1e-3


def test_prefixes():
    token_logp = np.array([-1.0, -2.0, -4.0, -8.0, -16.0])
    assert prefix_sums(token_logp, [3, 2], None).tolist() == [-7.0, -24.0]
    assert prefix_sums(token_logp, [3, 2], 2).tolist() == [-3.0, -24.0]
    assert prefix_sums(token_logp, [3, 2], 1).tolist() == [-1.0, -8.0]


def test_what_cannot_be_weighed_is_said_in_one_line():
    p = P.copy()
    p[3, 1] = -np.inf
    with pytest.raises(FasttrError, match=r"pair 3, completion 1 has log-probs -inf"):
        pair_weights(p, Q, RatioSettings())
    with pytest.raises(FasttrError, match=r"ratio_alpha: got 1\.5"):
        RatioSettings(alpha=1.5)
