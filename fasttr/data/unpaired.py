"""Unpaired rows for KTO: pairs taken apart, and each row's mismatched completion put into its tree.

The mismatched completion estimates the KL term of `kto`. It is fixed once, by TRL's rotation in the
order of the data: inside each block of consecutive rows every prompt gets the completion of the row
before it, the first one that of the last. Sharing the prompt, it costs its own tokens and no
forward of its own.
"""

from __future__ import annotations

import numpy as np

from fasttr.batch import Tree, TreeSource

UNPAIR_BLOCK = 1000  # TRL takes pairs apart in blocks: all chosen of a block, then all rejected


class Unpaired:
    """A TreeSource of trees (completion,) or, with `block`, (completion, mismatched completion),
    each with a label.

    Args:
        source: trees of one completion, with `labels`, or of two (chosen, rejected), which are
            taken apart.
        block: rows inside which completions rotate; None adds no mismatched completion.
        max_length: a mismatched completion is cut so that prompt and completion fit.
    """

    def __init__(
        self,
        source: TreeSource,
        *,
        labels: np.ndarray | None,
        block: int | None,
        max_length: int | None,
    ):
        self.source, n = source, len(source)
        if source.completion_lengths.shape[1] == 2:
            blocks = [
                np.arange(first, min(first + UNPAIR_BLOCK, n))
                for first in range(0, n, UNPAIR_BLOCK)
            ]
            self._row = np.concatenate([np.concatenate([b, b]) for b in blocks])
            self._side = np.concatenate([np.repeat([0, 1], len(b)) for b in blocks])
            self.labels = self._side == 0
        else:
            if labels is None:
                raise ValueError("got unpaired rows without labels; wanted a label column")
            self._row, self._side, self.labels = np.arange(n), np.zeros(n, dtype=np.int64), labels
        self.prompt_lengths = source.prompt_lengths[self._row]
        own = source.completion_lengths[self._row, self._side]
        self._partner: np.ndarray | None = None
        lengths = [own]
        if block is not None:
            starts = np.arange(len(own)) // block * block
            ends = np.minimum(starts + block, len(own))
            before = np.arange(len(own)) - 1
            self._partner = np.where(before < starts, ends - 1, before)
            cut = own[self._partner]
            lengths.append(
                cut if max_length is None else np.minimum(cut, max_length - self.prompt_lengths)
            )
        self.completion_lengths = np.stack(lengths, axis=1).astype(np.int32)
        self.fingerprint = f"{source.fingerprint}/unpaired/{block}/{max_length}"

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, row: int) -> Tree:
        tree = self.source[int(self._row[row])]
        completions = [tree.completions[self._side[row]]]
        if self._partner is not None:
            other = int(self._partner[row])
            mismatched = self.source[int(self._row[other])].completions[self._side[other]]
            completions.append(mismatched[: self.completion_lengths[row, 1]])
        return Tree(
            int(row), tree.prompt_ids, tuple(completions), tree.weight, bool(self.labels[row])
        )
