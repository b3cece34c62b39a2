"""Which rows make which optimizer step, which trees share a pack, and where the reference moves:
all known before training, a pure function of the row lengths and the configuration, so that
resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from fasttr.batch import PackedBatch, TreeSource
from fasttr.packing.layout import first_fit_decreasing, pack


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """TRL's order: a permutation from a CPU generator seeded with seed + epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).numpy()


@dataclass(frozen=True)
class Plan:
    """Optimizer steps over a data set.

    An epoch's remainder is a shorter last step, normalised by its own row count. `max_steps` above
    0 wins over `num_train_epochs`, which may be a fraction.
    """

    source: TreeSource = field(repr=False)
    train_batch_size: int
    num_train_epochs: float
    max_steps: int
    seed: int
    max_tokens_per_batch: int
    shuffle: bool = True  # else the order of the data, in every epoch
    group_rows: int = (
        1  # consecutive rows of a step that share a pack, since their loss is computed together
    )
    multiple_of: int = 1  # an epoch's last rows that do not fill this many are left out

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.train_batch_size)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.source) - len(self.source) % self.multiple_of

    @property
    def total_steps(self) -> int:
        return (
            self.max_steps
            if self.max_steps > 0
            else math.ceil(self.num_train_epochs * self.steps_per_epoch)
        )

    def rows(self, step: int) -> np.ndarray:
        """Data-set rows of optimizer step `step` (counted from 0), in TRL's order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.train_batch_size
        here = slice(first, min(first + self.train_batch_size, self.rows_per_epoch))
        if not self.shuffle:
            return np.arange(len(self.source))[here]
        return epoch_order(len(self.source), self.seed, epoch)[here]

    def packs(self, step: int) -> list[PackedBatch]:
        """The packs of one step. Their number and content follow from the lengths alone."""
        return pack_rows(self.source, self.rows(step), self.max_tokens_per_batch, self.group_rows)

    def windows(self, every: int | None, start: int = 0) -> Iterator[range]:
        """Steps [0, every), [every, 2 every), ... from the window that holds `start`; one window
        without moves."""
        total = self.total_steps
        length = every or max(total, 1)
        for first in range(start - start % length, total, length):
            yield range(first, min(first + length, total))

    def tokens(self, rows: np.ndarray) -> int:
        """Packed tokens of some rows: each prompt once."""
        return int(tree_sizes(self.source, rows).sum())


def tree_sizes(source: TreeSource, rows: np.ndarray | Sequence[int]) -> np.ndarray:
    """Packed tokens per tree: the prompt once and every completion."""
    return source.prompt_lengths[rows].astype(np.int64) + source.completion_lengths[rows].sum(
        axis=1, dtype=np.int64
    )


def pack_rows(
    source: TreeSource, rows: np.ndarray | Sequence[int], budget: int, group_rows: int = 1
) -> list[PackedBatch]:
    """Pack some rows, first-fit decreasing under `budget` tokens; `group_rows` consecutive ones
    stay together."""
    rows = np.asarray(rows)
    groups = [rows[first : first + group_rows] for first in range(0, len(rows), group_rows)]
    sizes = np.add.reduceat(tree_sizes(source, rows), np.arange(0, len(rows), group_rows))
    packs = []
    for members in first_fit_decreasing(sizes.tolist(), budget):
        trees = [source[int(row)] for g in members for row in groups[g]]
        packs.append(pack(trees, [len(groups[g]) for g in members]))
    return packs
