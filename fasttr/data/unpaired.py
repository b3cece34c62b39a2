"""Unpaired rows for KTO: each row's mismatched completion put into its tree.

The mismatched completion estimates the KL term of `kto`. It is fixed once, by TRL's rotation in the
order of the data: inside each block of consecutive rows every prompt gets the completion of the row
before it, the first one that of the last. Sharing the prompt, it costs its own tokens and no
forward of its own.

Legend: n unpaired rows.
"""

from __future__ import annotations

import numpy as np

from fasttr.batch import Tree, TreeSource

UNPAIR_BLOCK = 1000  # TRL takes pairs apart in blocks: all chosen of a block, then all rejected


class Unpaired:
    """A TreeSource of trees (completion,) or (completion, mismatched completion), with labels.

    Args:
        source: trees of one completion, with `labels`, or of two (chosen, rejected), which are
            taken apart.
        labels: (n,) bool of a source with one completion; None for pairs.
        block: rows inside which completions rotate; None adds no mismatched completion.
        max_length: a mismatched completion is cut so that prompt and completion fit.
        shares: consecutive shares of the rows in which blocks begin anew, as TRL's processes have
            them (`dataset_num_proc`).
    """

    prompt_skips: np.ndarray | None = None  # every row has one prompt

    def __init__(
        self,
        source: TreeSource,
        *,
        labels: np.ndarray | None,
        block: int | None,
        max_length: int | None,
        shares: int = 1,
    ):
        self.source = source
        if source.completion_lengths.shape[1] == 2:
            self._row, self._side = _taken_apart(len(source))
            self.labels = self._side == 0
        elif labels is not None:
            self._row = np.arange(len(source))
            self._side = np.zeros(len(source), dtype=np.int64)
            self.labels = labels
        else:
            raise ValueError("got unpaired rows without labels; wanted a label column")
        self.positions = source.positions[self._row]
        self.largest_id = source.largest_id
        self.prompt_lengths = source.prompt_lengths[self._row]
        own_lengths = source.completion_lengths[self._row, self._side]
        lengths = [own_lengths]
        whole_lengths = getattr(source, "uncut_lengths", None)
        self._uncut = None if whole_lengths is None else source.uncut  # type: ignore[attr-defined]
        self._partner: np.ndarray | None = None
        if block is not None:
            self._partner = _rotated(len(self._row), block, shares)
            mismatched = (own_lengths if whole_lengths is None else whole_lengths)[self._partner]
            if max_length is not None:
                mismatched = np.minimum(mismatched, max_length - self.prompt_lengths)
            lengths.append(mismatched)
        self.completion_lengths = np.stack(lengths, axis=1).astype(np.int32)
        self.fingerprint = f"{source.fingerprint}/unpaired/{block}/{max_length}/{shares}"

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, row: int) -> Tree:
        tree = self.source[int(self._row[row])]
        completions = [tree.completions[self._side[row]]]
        if self._partner is not None:
            mismatched = self._whole(int(self._partner[row]))
            completions.append(mismatched[: self.completion_lengths[row, 1]])
        return Tree(
            int(row), tree.prompt_ids, tuple(completions), tree.weight, bool(self.labels[row])
        )

    def _whole(self, row: int) -> np.ndarray:
        """A row's completion, where the source still has it as it was before it was cut."""
        if self._uncut is not None:
            return self._uncut(row)
        return self.source[int(self._row[row])].completions[self._side[row]]


def shares_of(rows: int, shares: int) -> list[range]:
    """Consecutive shares as `datasets` deals rows to processes: the first ones have one more."""
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(rows), max(shares, 1))])
    return [range(first, end) for first, end in zip([0, *ends[:-1]], ends, strict=True)]


def _taken_apart(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair and the side of each unpaired row, in TRL's order."""
    rows, sides = [], []
    for first in range(0, pairs, UNPAIR_BLOCK):
        block = np.arange(first, min(first + UNPAIR_BLOCK, pairs))
        rows += [block, block]
        sides += [np.zeros(len(block), dtype=np.int64), np.ones(len(block), dtype=np.int64)]
    return np.concatenate(rows), np.concatenate(sides)


def _rotated(rows: int, block: int, shares: int) -> np.ndarray:
    """(rows,) the row before each one; for the first row of a block the block's last."""
    partners = []
    for share in shares_of(rows, min(shares, rows)):
        place = np.arange(len(share))
        start = place // block * block
        last = np.minimum(start + block, len(share)) - 1
        partners.append(share.start + np.where(place == start, last, place - 1))
    return np.concatenate(partners)
