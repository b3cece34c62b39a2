"""Which settings are run: a fraction of the grid, chosen by formulas before any run.

A seed runs each writer once; which two of them get pairs that part early changes from seed to seed.
Loss, noise and beta follow Latin squares: with u, v the two digits of the seed in base 3 and w the
writer, loss = u + w, noise = v + 2 w and beta = loss + noise + w, all mod 3. Seeds 9 to 17 repeat
the first nine with the parts exchanged and beta = loss + 2 noise + 2 w. So each seed holds every
level of every factor, and in 18 seeds any two levels of two factors meet equally often (an
orthogonal array of strength 2: 72 of 216 settings). Every setting is run with every reference: how
a factor changes what a reference does is seen within settings.

Legend: S settings, columns of a design are contrasts that add up to zero over a factor's levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasttr.toy.writers import PARTS, WRITERS

NOISES = (0.0, 0.1, 0.3)
LOSSES = ("sigmoid", "ipo_sum", "kto_paired")
BETAS = (0.1, 0.3, 1.0)
FIRST_SEED = 100  # those of the pilot are below
SEEDS = 18  # of the whole fraction
SPLITS = ((0, 1), (0, 2), (0, 3))  # writers whose pairs part early


class Setting(NamedTuple):
    """A level of each factor."""

    writer: str
    part: str
    noise: float
    loss: str
    beta: float

    @property
    def name(self) -> str:
        return f"{self.writer}-{self.part}-noise{self.noise:g}-{self.loss}-beta{self.beta:g}"


FACTORS: dict[str, tuple[object, ...]] = {
    "writer": WRITERS,
    "part": PARTS,
    "noise": NOISES,
    "loss": LOSSES,
    "beta": BETAS,
}


def settings_of(seed: int) -> list[Setting]:
    """The four settings of a seed, counted from 0."""
    u, v, half = seed % 3, seed // 3 % 3, seed // 9 % 2
    early = SPLITS[(u + v) % 3]
    settings = []
    for w, writer in enumerate(WRITERS):
        loss = (u + w) % 3
        noise = (v + 2 * w) % 3
        beta = (loss + (1 + half) * (noise + w)) % 3
        part = PARTS[(w in early) == bool(half)]
        settings.append(Setting(writer, part, NOISES[noise], LOSSES[loss], BETAS[beta]))
    return settings


def contrasts(levels: Sequence[object], values: Sequence[object]) -> np.ndarray:
    """(S, L - 1) columns of a factor with L levels: +1 at a level, -1 at the last."""
    columns = np.array([[value == level for level in levels] for value in values], dtype=float)
    return columns[:, :-1] - columns[:, -1:]


def interaction(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(S, A B) products of the columns of (S, A) and (S, B)."""
    return (first[:, :, None] * second[:, None, :]).reshape(len(first), -1)


def design_matrix(
    settings: Sequence[Setting], arms: Sequence[str], reference_by: Sequence[str]
) -> np.ndarray:
    """A row for each setting with each arm; columns: a constant, every factor, the reference, and
    the reference by each of `reference_by` ("writer part" is the product of the two)."""
    rows = list(itertools.product(settings, arms))
    of_factor = {
        name: contrasts(levels, [getattr(setting, name) for setting, _ in rows])
        for name, levels in FACTORS.items()
    }
    of_factor["writer part"] = interaction(of_factor["writer"], of_factor["part"])
    reference = contrasts(arms, [arm for _, arm in rows])
    columns = [np.ones((len(rows), 1)), *of_factor.values(), reference]
    columns += [interaction(of_factor[name], reference) for name in reference_by]
    return np.hstack(columns)
