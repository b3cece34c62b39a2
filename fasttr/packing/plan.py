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

from fasttr.batch import PackedBatch, Tree, TreeSource, own_prompt_lengths
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.packing.layout import balanced_bins, idle_pack, pack
from fasttr.packing.parts import cut, number_of_parts, with_parts
from fasttr.packing.shares import even_shares, in_micro_steps, micro_steps
from fasttr.packing.tiers import SHARED, bins_of_groups, tree_sizes, unshared

SWEEP_ROWS = 256  # rows packed together


@dataclass(frozen=True)
class Plan:
    """Optimizer steps over a data set.

    An epoch's remainder is a shorter last step, normalised by its own row count, or, with
    `micro_batch_size`, the mean of its micro-batches' means. `max_steps` above 0 wins over
    `num_train_epochs`, which may be a fraction.
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
    micro_batch_size: int | None = None  # rows whose mean counts as that of any other so many
    multiple_of: int = 1  # an epoch's last rows that do not fill this many are left out
    # (n,) the number of each row's prompt: prompts are shuffled in place of rows, and the rows of
    # one follow each other and share it, but where a step ends between them.
    prompts: np.ndarray | None = field(default=None, repr=False)
    separate_groups: bool = False  # no two groups share a pack
    tier: str = SHARED  # one of packing.tiers.TIERS: how rows share a call of the model
    cuts: bool = False  # what must share a pack and is over the budget: see `packing.parts`

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

    def epochs(self, steps: int) -> float:
        """Passes over the rows after so many steps, by micro-batches as in TRL: a smaller last one
        counts as the others."""
        whole, within = divmod(steps, self.steps_per_epoch)
        size = self.micro_batch_size or self.train_batch_size
        of_a_step = self.train_batch_size // size
        return whole + within * of_a_step / math.ceil(self.rows_per_epoch / size)

    def rows(self, step: int) -> np.ndarray:
        """Data-set rows of optimizer step `step` (counted from 0), in TRL's order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.train_batch_size
        batch = slice(first, min(first + self.train_batch_size, self.rows_per_epoch))
        if self.prompts is not None:
            rank = epoch_order(int(self.prompts.max()) + 1, self.seed, epoch).argsort()
            return rank[self.prompts].argsort(kind="stable")[batch]
        if self.shuffle:
            return epoch_order(len(self.trees), self.seed, epoch)[batch]
        return np.arange(batch.start, batch.stop)

    def packs(self, step: int, ranks: Ranks = ALONE) -> list[PackedBatch]:
        """The packs of one step that are this rank's. They follow from the lengths alone.

        Among several ranks no row needs to share a pack with another: see
        `fasttr.training.coupled_step`.
        """
        rows = self.rows(step)
        weights = self._row_weights(rows)
        if self.prompts is not None:
            prompts = self.prompts[rows]
            return pack_by_prompt(self.trees, rows, prompts, self.max_tokens_per_batch, weights)
        return pack_rows(
            self.trees,
            rows,
            0 if self.separate_groups else self.max_tokens_per_batch,
            self.group_rows if ranks.world == 1 or self.separate_groups else 1,
            weights,
            tier=self.tier,
            ranks=ranks,
            cuts=self.cuts,
        )

    def one_pack(self, step: int) -> PackedBatch:
        """All rows of a step and their groups in one pack, in the step's order, however long."""
        rows = self.rows(step)
        weights = self._row_weights(rows)
        trees = [_weighted(self.trees[int(row)], weights, i) for i, row in enumerate(rows)]
        starts = range(0, len(rows), self.group_rows)
        return pack(trees, [min(self.group_rows, len(rows) - first) for first in starts])

    def micro_batches(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows),) the micro-batch of each row of a step, counted from 0."""
        return np.arange(len(rows)) // (self.micro_batch_size or max(len(rows), 1))

    def _row_weights(self, rows: np.ndarray) -> np.ndarray | None:
        """Factors that make a step's mean over its rows the mean of its micro-batches' means."""
        members = np.bincount(self.micro_batches(rows))
        if members.size == 0 or (members == members[0]).all():
            return None
        return (len(rows) / (len(members) * members))[self.micro_batches(rows)]

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


@lru_cache(maxsize=2)
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """TRL's order: a permutation from a CPU generator seeded with seed + epoch."""
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).numpy()


def unshared_tokens(trees: TreeSource, rows: np.ndarray, completions: int) -> int:
    """Tokens of the first so many completions of some rows, each with its prompt."""
    prompts = own_prompt_lengths(trees, rows)[:, :completions]
    own = trees.completion_lengths[rows, :completions]
    return int(prompts.sum() + own.sum(dtype=np.int64))


def pack_rows(
    trees: TreeSource,
    rows: np.ndarray | Sequence[int],
    budget: int,
    group_rows: int = 1,
    weights: np.ndarray | None = None,
    *,
    tier: str = SHARED,
    ranks: Ranks = ALONE,
    cuts: bool = False,
) -> list[PackedBatch]:
    """Pack some rows under `budget` tokens of the model; among several ranks, this one's even
    share of them: as many packs as every other rank where the weights are divided, some of them
    idle.

    Each run of `group_rows` rows stays together; one that is over the budget has a pack of its own,
    and with `cuts` that is in parts. `weights` (len(rows),) multiply those of the rows.
    """
    rows = np.asarray(rows)
    starts = np.arange(0, len(rows), group_rows)
    ends = np.minimum(starts + group_rows, len(rows))
    # Ranks that meet in every layer would have to know of all tokens of a group how it is cut.
    cuts = cuts and not (ranks.is_sharded and group_rows > 1)
    packs = []
    for turn in _turns(tier, trees, rows, starts, budget, ranks):
        members = turn[ranks.rank] if ranks.is_sharded else turn[0]
        places = [place for group in members for place in range(starts[group], ends[group])]
        chosen = [_weighted(trees[int(rows[place])], weights, place) for place in places]
        of_bin = chosen or [trees[int(rows[0])]]
        if tier != SHARED:
            of_bin = [unshared(tree) for tree in of_bin]
        if chosen:
            found = pack(of_bin, (ends - starts)[members].tolist(), budget if cuts else None)
        else:
            found = idle_pack(of_bin[0])
        if cuts:
            found = cut(found, budget, tier)
        if cuts and ranks.is_sharded:
            # More than one only in bins of a single row.
            alone = [int(rows[members[0]]) for members in turn if len(members) == 1]
            numbers = [number_of_parts(trees, row, budget, tier) for row in alone]
            found = with_parts(found, max(numbers, default=1), of_bin[0])
        packs.append(found)
    return packs


def _turns(
    tier: str,
    trees: TreeSource,
    rows: np.ndarray,
    starts: np.ndarray,
    budget: int,
    ranks: Ranks,
) -> list[list[list[int]]]:
    """Bins of groups of rows, which begin at `starts`: where the weights are divided one for every
    rank at a time, of which those without groups are idle; else this rank's, one by one."""
    if ranks.world == 1:
        return [[found] for found in bins_of_groups(tier, trees, rows, starts, budget)]
    sizes = np.add.reduceat(tree_sizes(trees, rows), starts).tolist()
    if not ranks.is_sharded:
        own = even_shares(sizes, ranks.world)[ranks.rank]
        if not own:
            return []
        ends = np.append(starts[1:], len(rows))
        own_rows = [rows[starts[group] : ends[group]] for group in own]
        own_starts = np.cumsum([0, *map(len, own_rows[:-1])])
        bins = bins_of_groups(tier, trees, np.concatenate(own_rows), own_starts, budget)
        return [[[own[number] for number in members]] for members in bins]
    if tier == SHARED:
        return micro_steps(sizes, ranks.world, budget)
    found = bins_of_groups(tier, trees, rows, starts, budget)
    return in_micro_steps(found, sizes, ranks.world)


def pack_by_prompt(
    trees: TreeSource,
    rows: np.ndarray,
    prompts: np.ndarray,
    budget: int,
    weights: np.ndarray | None = None,
) -> list[PackedBatch]:
    """Pack some rows, those of one prompt together as far as `budget` tokens allow.

    `prompts` (len(rows),): the number of each row's prompt; those of one prompt stand together.
    `weights` (len(rows),) multiply those of the rows.
    """
    runs: list[list[int]] = []
    sizes: list[int] = []
    own = trees.completion_lengths[rows].sum(axis=1, dtype=np.int64)
    newest = None
    for place, (prompt, tokens) in enumerate(zip(prompts.tolist(), own.tolist(), strict=True)):
        if prompt == newest and sizes[-1] + tokens <= budget:
            runs[-1].append(place)
            sizes[-1] += tokens
        else:
            runs.append([place])
            sizes.append(tokens + int(trees.prompt_lengths[rows[place]]))
        newest = prompt
    packs = []
    for members in balanced_bins(sizes, budget):
        places = [place for run in members for place in runs[run]]
        packs.append(pack([_weighted(trees[int(rows[p])], weights, p) for p in places]))
    return packs


def prompt_numbers(trees: TreeSource) -> np.ndarray:
    """(n,) a number for each row, the same for rows of the same prompt, by first appearance."""
    numbers: dict[bytes, int] = {}
    found = np.empty(len(trees), dtype=np.int64)
    for row in range(len(trees)):
        key = np.asarray(trees[row].prompt_ids, dtype=np.int32).tobytes()
        found[row] = numbers.setdefault(key, len(numbers))
    return found


def sweep(trees: TreeSource, budget: int) -> Iterator[PackedBatch]:
    """Packs of all rows, prompt by prompt, so that the rows of one share it."""
    prompts = prompt_numbers(trees)
    order = prompts.argsort(kind="stable")
    for first in range(0, len(order), SWEEP_ROWS):
        rows = order[first : first + SWEEP_ROWS]
        yield from pack_by_prompt(trees, rows, prompts[rows], budget)


def _weighted(tree: Tree, weights: np.ndarray | None, place: int) -> Tree:
    return tree if weights is None else tree._replace(weight=tree.weight * float(weights[place]))
