"""How two runs are compared that were measured on their way: each is a list of rows, the initial
policy's first, with `kl` (nats to the initial policy) among their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

GRID = 50  # points of KL

Rows = Sequence[dict[str, float]]


def at_equal_kl(key: str, moving: Rows, fixed: Rows) -> float:
    """`key` of one run less that of another, mean over the upper half of the KL that both reach;
    runs are read between their measurements by straight lines, in the order of their KL."""
    reach = min(max(row["kl"] for row in rows) for rows in (moving, fixed))
    kl = np.linspace(reach / 2, reach, GRID)
    return float(np.mean(_read(key, moving, kl) - _read(key, fixed, kl)))


def _read(key: str, rows: Rows, kl: np.ndarray) -> np.ndarray:
    ordered = sorted(rows, key=lambda row: row["kl"])
    return np.interp(kl, [row["kl"] for row in ordered], [row[key] for row in ordered])


def at_the_end(key: str, moving: Rows, fixed: Rows) -> float:
    return moving[-1][key] - fixed[-1][key]
