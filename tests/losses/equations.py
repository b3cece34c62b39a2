"""The equations of the losses typed again in numpy, from their papers, and points to take them at.

Legend: c, r: log-probs of chosen and rejected under the policy, c0, r0 under the reference; of
unpaired rows c is the row's own completion and r the mismatched one. Arrays are (B,), B = 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BETA = 0.3
SMOOTHING = 0.2
TAU = 0.7
GAMMA = 0.8
ALPHA = 0.3
DESIRABLE = 1.5
UNDESIRABLE = 0.6
SETTINGS = {
    "beta": BETA,
    "label_smoothing": SMOOTHING,
    "discopop_tau": TAU,
    "simpo_gamma": GAMMA,
    "f_alpha_divergence_coef": ALPHA,
    "desirable_weight": DESIRABLE,
    "undesirable_weight": UNDESIRABLE,
}


class Point(NamedTuple):
    """Four rows of a group."""

    c: np.ndarray
    r: np.ndarray
    c0: np.ndarray
    r0: np.ndarray
    n_c: np.ndarray  # tokens
    n_r: np.ndarray
    is_desirable: np.ndarray
    whole_c: np.ndarray  # c as it is without ld_alpha
    mean_n_c: np.ndarray  # tokens that sft divides by
    divergence: str = "reverse_kl"

    @property
    def u(self) -> np.ndarray:
        return self.c - self.c0

    @property
    def v(self) -> np.ndarray:
        return self.r - self.r0

    @property
    def f_u(self) -> np.ndarray:
        return DIVERGENCES[self.divergence](self.u)

    @property
    def f_v(self) -> np.ndarray:
        return DIVERGENCES[self.divergence](self.v)

    @property
    def h(self) -> np.ndarray:
        return BETA * (self.f_u - self.f_v)

    @property
    def per_token(self) -> np.ndarray:
        return self.f_u / self.n_c - self.f_v / self.n_r


def s(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def log_s(x: np.ndarray) -> np.ndarray:
    return np.log(s(x))


# arXiv:2309.16240, table 1.
DIVERGENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - np.exp(-x),
    "js_divergence": lambda x: np.log(2 * np.exp(x) / (1 + np.exp(x))),
    "alpha_divergence": lambda x: (np.exp((ALPHA - 1) * x) - 1) / (ALPHA - 1),
}


def smoothed(x: np.ndarray) -> np.ndarray:
    return -(1 - SMOOTHING) * log_s(x) - SMOOTHING * log_s(-x)


def at_least_0(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def exo_pair(p: Point) -> np.ndarray:
    chosen = s(p.h) * (log_s(p.h) - np.log(1 - SMOOTHING))
    rejected = s(-p.h) * (log_s(-p.h) - np.log(SMOOTHING))
    return chosen + rejected


def discopop(p: Point) -> np.ndarray:
    modulation = s(p.h / TAU)
    return (1 - modulation) * -log_s(p.h) + modulation * np.exp(-p.h)


def orpo(p: Point) -> np.ndarray:
    odds_c, odds_r = (np.exp(x) / (1 - np.exp(x)) for x in (p.c / p.n_c, p.r / p.n_r))
    return -p.c / p.n_c - BETA * log_s(np.log(odds_c / odds_r))


def kto(p: Point) -> np.ndarray:
    z = at_least_0(p.v.mean())
    desirable = DESIRABLE * (1 - s(BETA * (p.u - z)))
    undesirable = UNDESIRABLE * (1 - s(BETA * (z - p.u)))
    return np.where(p.is_desirable, desirable, undesirable)


def apo_zero_unpaired(p: Point) -> np.ndarray:
    share = s(BETA * p.u)
    return np.where(p.is_desirable, DESIRABLE * (1 - share), UNDESIRABLE * share)


def kto_paired(p: Point) -> np.ndarray:
    kl_u, kl_v = at_least_0(p.u.mean()), at_least_0(p.v.mean())
    return (1 - s(BETA * (p.u - kl_v)) + 1 - s(BETA * (kl_u - p.v))) / 2


EQUATIONS: dict[str, Callable[[Point], np.ndarray]] = {
    "sigmoid": lambda p: -log_s(p.h),
    "sigmoid_norm": lambda p: -log_s(BETA * p.per_token),
    "hinge": lambda p: at_least_0(1 - p.h),
    "ipo": lambda p: (p.per_token - 1 / (2 * BETA)) ** 2,
    "ipo_sum": lambda p: (p.u - p.v - 1 / (2 * BETA)) ** 2,
    "cdpo": lambda p: smoothed(p.h),
    "robust": lambda p: (
        (-(1 - SMOOTHING) * log_s(p.h) + SMOOTHING * log_s(-p.h)) / (1 - 2 * SMOOTHING)
    ),
    "exo_pair": exo_pair,
    "nca_pair": lambda p: -log_s(BETA * p.u) - 0.5 * log_s(-BETA * p.u) - 0.5 * log_s(-BETA * p.v),
    "bco_pair": lambda p: -log_s(BETA * p.u) - log_s(-BETA * p.v),
    "sppo_hard": lambda p: (p.u - 1 / (2 * BETA)) ** 2 + (p.v + 1 / (2 * BETA)) ** 2,
    "aot": lambda p: smoothed(BETA * (np.sort(p.c - p.r) - np.sort(p.c0 - p.r0))),
    "aot_unpaired": lambda p: smoothed(BETA * (np.sort(p.u) - np.sort(p.v))),
    "apo_zero": lambda p: 1 - s(BETA * p.u) + s(BETA * p.v),
    "apo_down": lambda p: s(BETA * p.u) + 1 - s(BETA * (p.u - p.v)),
    "discopop": discopop,
    "sft": lambda p: -p.whole_c / p.mean_n_c,
    "simpo": lambda p: -log_s(BETA * p.c / p.n_c - BETA * p.r / p.n_r - GAMMA),
    "orpo": orpo,
    "kto_paired": kto_paired,
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
}

_C = np.array([-12.0, -9.5, -20.0, -3.0])
_R = np.array([-13.0, -10.0, -22.0, -1.8])
_U = np.array([1.5, -0.7, 6.2, -1.9])
_V = np.array([-0.4, 1.9, 0.6, -0.5])
# Both sides' mean log-ratio is above 0, and ranks differ between policy and reference, u and v.
ABOVE = Point(
    c=_C,
    r=_R,
    c0=_C - _U,
    r0=_R - _V,
    n_c=np.array([5, 2, 9, 1]),
    n_r=np.array([3, 7, 4, 6]),
    is_desirable=np.array([True, False, False, True]),
    whole_c=_C - np.array([0.5, 1.0, 3.0, 0.0]),
    mean_n_c=np.array([4.0, 4.0, 2.5, 2.5]),
)
# Policy and reference have changed places: the means are below 0, where KTO's estimates stop.
BELOW = ABOVE._replace(c=ABOVE.c0, r=ABOVE.r0, c0=ABOVE.c, r0=ABOVE.r)
