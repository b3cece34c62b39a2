"""Which rows make which optimizer step, which trees share a pack, and where the reference moves.

All of it is known before training, a pure function of the row lengths and the configuration, so
that resuming is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache

import numpy as np
import torch

from fasttr.batch import PackedBatch, TreeSource
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.packing.layout import first_fit_decreasing, pack
from fasttr.packing.shares import even_shares


@dataclass(frozen=True)
class Plan:
    """Optimizer steps over a data set.

    An epoch's remainder is a shorter last step, normalised by its own row count. `max_steps` above
    0 wins over `num_train_epochs`, which may be a fraction.
    """

    trees: TreeSource = field(repr=False)
    _: KW_ONLY
    train_batch_size: int
    max_tokens_per_batch: int
    num_train_epochs: float = 1.0
    max_steps: int = -1
    seed: int = 42
    shuffle: bool = True  # else the order of the data, in every epoch
    group_rows: int = 1  # consecutive rows of a step whose loss is computed together share a pack
    multiple_of: int = 1  # an epoch's last rows that do not fill this many are left out

    @property
    def rows_per_epoch(self) -> int:
        return len(self.trees) - len(self.trees) % self.multiple_of

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows_per_epoch / self.train_batch_size)

    @property
    def total_steps(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * self.steps_per_epoch)

    def rows(self, step: int) -> np.ndarray:
        """Data-set rows of optimizer step `step` (counted from 0), in TRL's order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.train_batch_size
        batch = slice(first, min(first + self.train_batch_size, self.rows_per_epoch))
        if self.shuffle:
            return epoch_order(len(self.trees), self.seed, epoch)[batch]
        return np.arange(batch.start, batch.stop)

    def packs(self, step: int, ranks: Ranks = ALONE) -> list[PackedBatch]:
        """The packs of one step that are this rank's. They follow from the lengths alone.

        Among several ranks no row needs to share a pack with another: see
        `fasttr.training.coupled_step`.
        """
        group_rows = self.group_rows if ranks.world == 1 else 1
        rows = self.rows(step)
        return pack_rows(self.trees, rows, self.max_tokens_per_batch, group_rows, ranks)

    def windows(self, every: int | None, start: int = 0) -> Iterator[range]:
        """Steps [0, every), [every, 2 every), ... from the window that holds `start`.

        One window where the reference never moves.
        """
        total = self.total_steps
        length = every or max(total, 1)
        for first in range(start - start % length, total, length):
            yield range(first, min(first + length, total))

    def tokens(self, rows: np.ndarray) -> int:
        """Packed tokens of some rows: each prompt once."""
        return int(tree_sizes(self.trees, rows).sum())

    def unshared_tokens(self, rows: np.ndarray) -> int:
        """Tokens of an unshared layout: the prompt once per completion."""
        completions = self.trees.completion_lengths[rows]
        prompts = completions.shape[1] * self.trees.prompt_lengths[rows].sum(dtype=np.int64)
        return int(completions.sum(dtype=np.int64) + prompts)


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """TRL's order: a permutation from a CPU generator seeded with seed + epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).numpy()


def tree_sizes(trees: TreeSource, rows: np.ndarray | Sequence[int]) -> np.ndarray:
    """Packed tokens of each tree: the prompt once and every completion."""
    completions = trees.completion_lengths[rows].sum(axis=1, dtype=np.int64)
    return trees.prompt_lengths[rows] + completions


def pack_rows(
    trees: TreeSource,
    rows: np.ndarray | Sequence[int],
    budget: int,
    group_rows: int = 1,
    ranks: Ranks = ALONE,
) -> list[PackedBatch]:
    """Pack some rows, first-fit decreasing under `budget` tokens; among several ranks, this one's
    even share of them.

    Each run of `group_rows` rows stays together.
    """
    rows = np.asarray(rows)
    starts = np.arange(0, len(rows), group_rows)
    groups = np.split(rows, starts[1:])
    sizes = np.add.reduceat(tree_sizes(trees, rows), starts)
    share = even_shares(sizes.tolist(), ranks.world)[ranks.rank]
    packs = []
    for places in first_fit_decreasing(sizes[share].tolist(), budget):
        members = [share[place] for place in places]
        chosen = [trees[int(row)] for group in members for row in groups[group]]
        packs.append(pack(chosen, [len(groups[group]) for group in members]))
    return packs
