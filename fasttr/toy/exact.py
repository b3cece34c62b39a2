"""A toy of off-policy-corrected reward models in which all but the labels is exact.

Texts are eight letters of {filler, a, b, c}; the SFT policy draws each by itself. Everything here
depends on the counts of the letters alone, so a policy is a vector over the 165 counts, and gold
reward, KL, losses and accuracies are sums over them. Labels are Bradley-Terry on gold reward,
drawn once. The reward model is linear in the counts of a, b and c: too simple for two of the gold
rewards, on purpose, and right for the third. Stage i tilts the policy of the stage before:
pi_i ~ pi_{i-1} exp(reward_i / beta), the exact answer of a KL-regularised step whose reference is
pi_{i-1}.

Legend: S counts, P pairs, F features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fasttr.losses.ratios import RatioSettings, pair_weights

LENGTH = 8
PROBABILITIES = (0.55, 0.20, 0.15, 0.10)  # filler, a, b, c
RIDGE = 1e-3
ARMS = ("fixed", "weighted", "shuffled", "fresh")


def all_counts(length: int) -> np.ndarray:
    """(S, 4) how many of each letter, in every way that so many letters can be."""
    found = []
    for a in range(length + 1):
        for b in range(length + 1 - a):
            found += [(length - a - b - c, a, b, c) for c in range(length + 1 - a - b)]
    return np.array(found)


COUNTS = all_counts(LENGTH)
FEATURES = COUNTS[:, 1:].astype(np.float64)  # (S, F)


def logp_of_counts(counts: np.ndarray) -> np.ndarray:
    """(S,) under the SFT policy."""
    length = int(counts[0].sum())
    factorials = np.array([math.lgamma(n + 1) for n in range(length + 1)])
    orders = factorials[length] - factorials[counts].sum(axis=1)
    return orders + counts @ np.log(PROBABILITIES)


SFT_LOGP = logp_of_counts(COUNTS)


def _saturating(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.minimum(a, 3) - 1.2 * np.maximum(a - 3, 0) + 0.35 * c - 0.3 * b


def _interaction(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return 1.4 * a - 0.25 * a**2 + 0.25 * c * np.minimum(a, 2) - 0.3 * b


def _well_specified(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return 0.8 * a - 0.3 * b + 0.35 * c


GOLDS: dict[str, np.ndarray] = {  # (S,) each
    "saturating": _saturating(*FEATURES.T),
    "interaction": _interaction(*FEATURES.T),
    "well-specified": _well_specified(*FEATURES.T),
}


class Settings(NamedTuple):
    """Of one run of stages."""

    gold: str = "saturating"
    stages: int = 15
    pairs: int = 20_000
    beta: float = 3.0
    resets_reference: bool = True  # else every stage tilts the SFT policy
    ratios: RatioSettings = RatioSettings(alpha=0.1, tau=1.0, min_ess=0.0)


class Stage(NamedTuple):
    """What a stage ended with."""

    logp: np.ndarray  # (S,) the policy
    theta: np.ndarray  # (F,) the reward model that it was tilted by
    gold: float  # mean gold reward of the policy
    kl: float  # nats a text, to the SFT policy
    effective_size: float  # pairs, of the weights that the reward model was fitted with


class Loss(NamedTuple):
    """Of a reward model on all pairs that a policy can write."""

    excess: float  # Bradley-Terry loss beyond that of the gold reward
    accuracy: float  # of pairs whose gold rewards differ


def run(arm: str, seed: int, settings: Settings = Settings()) -> list[Stage]:  # noqa: B008
    """All stages of one arm.

    fixed: one reward model; weighted: refitted with density ratios; shuffled: with the same weights
    dealt out to the pairs at random, the control for their spread; fresh: on new labelled pairs of
    each stage's policy, the bound.
    """
    gold = GOLDS[settings.gold]
    pairs = draw_pairs(np.random.default_rng(seed), SFT_LOGP, gold, settings.pairs)
    later = np.random.default_rng([seed, 1])
    policy = SFT_LOGP
    theta = None
    stages: list[Stage] = []
    for number in range(settings.stages):
        weights = np.ones(len(pairs))
        size = float(len(pairs))
        if arm in ("weighted", "shuffled"):
            found = pair_weights(policy[pairs], SFT_LOGP[pairs], settings.ratios)
            weights, size = found.weights, found.effective_size
        if arm == "shuffled":
            weights = later.permutation(weights)
        if arm == "fresh" and number > 0:
            pairs = draw_pairs(later, policy, gold, settings.pairs)
        if theta is None or arm != "fixed":
            theta = fit_reward(pairs, weights)
        start = policy if settings.resets_reference else SFT_LOGP
        policy = tilted(start, theta, settings.beta)
        stages.append(_stage(policy, theta, gold, size))
    return stages


def draw_pairs(
    rng: np.random.Generator, logp: np.ndarray, gold: np.ndarray, pairs: int
) -> np.ndarray:
    """(P, 2) counts of texts of a policy, the preferred one first: 1 with s(gold_1 - gold_2)."""
    drawn = rng.choice(len(logp), size=(pairs, 2), p=np.exp(logp))
    difference = gold[drawn[:, 0]] - gold[drawn[:, 1]]
    is_second = rng.random(pairs) > 1 / (1 + np.exp(-difference))
    drawn[is_second] = drawn[is_second][:, ::-1]
    return drawn


def fit_reward(pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(F,) the linear reward of pairs of counts, the preferred one first."""
    return fit_linear(FEATURES[pairs[:, 0]] - FEATURES[pairs[:, 1]], weights, RIDGE)


def fit_linear(difference_PF: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """(F,) what minimises the weighted sum of Bradley-Terry losses of pairs, whose features differ
    by so much, and ridge/2 |theta|^2; by Newton's method."""
    theta = np.zeros(difference_PF.shape[1])
    for _ in range(50):
        is_wrong = np.exp(-np.logaddexp(0, difference_PF @ theta))
        gradient = ridge * theta - (weights * is_wrong) @ difference_PF
        curvature = weights * is_wrong * (1 - is_wrong)
        hessian = (difference_PF * curvature[:, None]).T @ difference_PF
        step = np.linalg.solve(hessian + ridge * np.eye(len(theta)), gradient)
        theta = theta - step
        if np.abs(step).max() < 1e-10:
            break
    return theta


def tilted(logp: np.ndarray, theta: np.ndarray, beta: float) -> np.ndarray:
    """(S,) logp of the policy ~ exp(logp + reward / beta)."""
    unscaled = logp + FEATURES @ theta / beta
    return unscaled - np.logaddexp.reduce(unscaled)


def best_single_stage(theta: np.ndarray, gold: np.ndarray) -> float:
    """The most gold reward that a fixed reward model leads to, when beta is chosen by gold."""
    betas = np.geomspace(0.05, 30, 200)
    return max(float(np.exp(tilted(SFT_LOGP, theta, b)) @ gold) for b in betas)


def loss_under(logp: np.ndarray, theta: np.ndarray, gold: np.ndarray) -> Loss:
    """Of a reward model on the pairs of a policy, an exact sum."""
    share_SS = np.exp(logp[:, None] + logp[None, :])
    score = FEATURES @ theta
    by_score = score[:, None] - score[None, :]
    by_gold = gold[:, None] - gold[None, :]
    is_better = 1 / (1 + np.exp(-by_gold))
    excess = _cross_entropy(is_better, by_score) - _cross_entropy(is_better, by_gold)
    differs = share_SS * (np.abs(by_gold) > 1e-9)
    right = differs * ((by_score > 0) == (by_gold > 0))
    return Loss(float((share_SS * excess).sum()), float(right.sum() / differs.sum()))


def _cross_entropy(is_better: np.ndarray, margin: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -margin) * is_better + np.logaddexp(0, margin) * (1 - is_better)


def _stage(logp: np.ndarray, theta: np.ndarray, gold: np.ndarray, size: float) -> Stage:
    probability = np.exp(logp)
    return Stage(
        logp=logp,
        theta=theta,
        gold=float(probability @ gold),
        kl=float(probability @ (logp - SFT_LOGP)),
        effective_size=size,
    )
