"""The log-probs of a reference that are left when its weights are not needed any more.

Legend: N completions of a pack, n rows of a data set, m completions of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.distributed.ranks import Ranks
from fasttr.errors import FasttrError
from fasttr.models.packed import PackedModel


class LogpTable:
    """Summed log-probs of each row's completions, fp32 nats; NaN where they are not known yet."""

    def __init__(self, rows: int, completions: int):
        self.values = np.full((rows, completions), np.nan, dtype=np.float32)  # (n, m)

    def put(self, rows: Iterable[int], logp: Tensor) -> None:
        """`logp` (N,): the completions of `rows`, row after row. FasttrError where one is not
        finite."""
        rows = list(rows)
        values = logp.cpu().numpy().reshape(-1, self.values.shape[1])
        broken = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(broken):
            raise FasttrError(
                f"the log-probs of row {rows[broken[0]]} (of those kept, counted from 0) are "
                f"{values[broken[0]].tolist()}; wanted finite ones: the model that scores has "
                "diverged, or its numbers are too large for what it computes in (bf16)"
            )
        self.values[rows] = values

    def get(self, rows: Iterable[int]) -> Tensor:
        """(N,) on the host, row after row."""
        values = self.values[list(rows)]
        if np.isnan(values).any():
            raise RuntimeError("a row is used before the reference's log-probs of it are known")
        return torch.from_numpy(values.reshape(-1))

    def lacks(self, rows: Iterable[int]) -> bool:
        return bool(np.isnan(self.values[list(rows)]).any())

    def clear(self) -> None:
        self.values.fill(np.nan)

    def merge(self, rows: np.ndarray, ranks: Ranks) -> None:
        """Make what any rank knows of `rows` known to all."""
        found = self.values[rows]
        ranks.merge_(found)
        self.values[rows] = found

    def known_rows(self) -> np.ndarray:
        return np.flatnonzero(~np.isnan(self.values).any(axis=1))


def fill_logps(
    model: PackedModel,
    packs: Iterable[PackedBatch],
    table: LogpTable,
    after: Callable[[], None] | None = None,
) -> None:
    """The model's log-probs of packs into `table`; a pack whose rows are all there is passed over,
    unless the model is divided: then every rank goes through as many packs as the others.

    `after` is called after every pack (progress, a partial save, a stop asked for by a signal).
    """
    newest: tuple[tuple[int, ...], Tensor] | None = None
    with model.weights_still():
        for batch in packs:
            if model.shards is not None or table.lacks(batch.rows):
                logp = model.logps(batch)
                if newest is not None:
                    # One pack late: reading the newest would leave the device idle.
                    table.put(*newest)
                newest = (batch.rows, logp) if batch.rows else None
            if after is not None:
                after()
    if newest is not None:
        table.put(*newest)
