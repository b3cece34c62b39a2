"""Density ratios of a policy to the one that wrote the data, as weights of pairs: fp64 vectors in,
fp64 vectors out, in log space until the last line.

With p and q the summed log-probs of a completion under the policy and under the writer, the weight
of a completion is the relative density ratio p / (alpha p + (1 - alpha) q) (arXiv:1106.4729), at
most 1/alpha, and that of a pair the product of both. Flattened by an exponent tau and scaled to
mean 1 it multiplies the pair's loss (arXiv:2507.15507).

Legend: N completions, P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fasttr.errors import FasttrError

Vector = np.ndarray  # fp64


def log_relative(p: Vector, q: Vector, alpha: float) -> Vector:
    """log of p / (alpha p + (1 - alpha) q): at most -log(alpha); p - q where alpha is 0."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if alpha == 0:
        return p - q
    if alpha == 1:
        return np.zeros_like(p)
    return -np.logaddexp(math.log(alpha), math.log1p(-alpha) + q - p)


def normalised(log_weight: Vector) -> Vector:
    """Scaled to mean weight 1."""
    return log_weight - _logsumexp(log_weight) + math.log(len(log_weight))


def effective_size(log_weight: Vector) -> float:
    """(sum w)^2 / sum w^2: how many equal weights are worth as much."""
    return math.exp(2 * _logsumexp(log_weight) - _logsumexp(2 * log_weight))


def tau_for(log_weight: Vector, target: float, most: float = 1.0) -> float:
    """The largest exponent up to `most` with an effective size of at least `target`.

    The size falls with the exponent: d log ESS / d tau is twice a difference of means of the log
    weights under w^tau and under w^(2 tau).
    """
    if effective_size(most * log_weight) >= target:
        return most
    low, high = 0.0, most
    while high - low > 1e-12 * most:
        middle = (low + high) / 2
        if effective_size(middle * log_weight) >= target:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class RatioSettings:
    """How log-probs become weights; FasttrError on a value out of range."""

    alpha: float = 0.1  # relative ratio; 0 is the plain one
    tau: float = 1.0  # exponent that flattens
    min_ess: float = (
        0.1  # share of the pairs that the effective size is kept above, by lowering tau
    )
    clip: float | None = None  # largest log-weight of a pair, before it is flattened

    def __post_init__(self) -> None:
        for name, most in (("alpha", 1.0), ("tau", 1.0), ("min_ess", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise FasttrError(f"ratio_{name}: got {value}; wanted a number from 0 to {most:g}")


# As arXiv:2507.15507 is released: its weights lie within some twenty per cent of each other.
RELEASE = RatioSettings(alpha=0.1, tau=0.001, min_ess=0.0)
NOTICE_TAU = 0.05  # weights flattened by less than this differ little from each other


class Ratios(NamedTuple):
    """Weights of pairs and what they are worth."""

    weights: Vector  # (P,) of mean 1
    tau: float  # the exponent that was used
    effective_size: float  # pairs
    largest_share: float  # of the sum of all weights
    length_correlation: float  # of log-weight and tokens of a pair; 0 where one does not vary


def pair_weights(
    p: Vector,
    q: Vector,
    settings: RatioSettings,
    lengths: Vector | None = None,
) -> Ratios:
    """Weights of pairs from the log-probs (P, 2) of their completions, in nats.

    In order: relative, product over the pair, clipped, flattened, scaled to mean 1. `lengths`
    (P, 2): tokens of the completions. FasttrError names the first pair with a log-prob that is not
    finite.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    _require_finite(p, q)
    log_weight = log_relative(p, q, settings.alpha).sum(axis=1)
    if settings.clip is not None:
        log_weight = np.minimum(log_weight, settings.clip)
    tau = tau_for(log_weight, settings.min_ess * len(log_weight), settings.tau)
    flat = normalised(tau * log_weight)
    weights = np.exp(flat)
    return Ratios(
        weights=weights,
        tau=tau,
        effective_size=effective_size(flat),
        largest_share=float(weights.max() / weights.sum()),
        length_correlation=_correlation(log_weight, lengths),
    )


def prefix_sums(token_logp: Vector, lengths: Vector, tokens: int | None) -> Vector:
    """(N,) log-probs summed over the first `tokens` of each completion, None for all.

    `token_logp` (R,) lists the completions one after the other, `lengths` (N,) says how long each
    is.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    kept = ends if tokens is None else np.minimum(starts + tokens, ends)
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(token_logp, dtype=np.float64))))
    return sums[kept] - sums[starts]


def _require_finite(p: Vector, q: Vector) -> None:
    broken = np.argwhere(~(np.isfinite(p) & np.isfinite(q)))
    if len(broken):
        pair, side = broken[0].tolist()
        raise FasttrError(
            f"ratios: pair {pair}, completion {side} has log-probs {p[pair, side]} under the "
            f"policy and {q[pair, side]} under the writer; wanted finite ones"
        )


def _correlation(log_weight: Vector, lengths: Vector | None) -> float:
    if lengths is None:
        return 0.0
    tokens = np.asarray(lengths, dtype=np.float64).sum(axis=1)
    if len(tokens) < 2 or np.ptp(tokens) == 0 or np.ptp(log_weight) == 0:
        return 0.0
    return float(np.corrcoef(log_weight, tokens)[0, 1])


def _logsumexp(x: Vector) -> float:
    top = float(np.max(x))
    return top + math.log(float(np.exp(x - top).sum()))
