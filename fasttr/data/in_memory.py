"""Trees that are already here as a TreeSource: made by hand, or drawn by a policy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from fasttr.batch import Tree


class ListTrees:
    """A list of trees of one number of completions; their `row` becomes their place in it."""

    labels: np.ndarray | None  # (n,) bool
    prompt_skips: np.ndarray | None  # (n, m) int32
    positions: np.ndarray  # (n,)

    def __init__(self, trees: Sequence[Tree]):
        self.trees = [tree._replace(row=row) for row, tree in enumerate(trees)]
        numbers = {len(tree.completions) for tree in self.trees}
        if len(numbers) != 1:
            raise ValueError(
                f"got trees of {sorted(numbers)} completions; wanted one number of them for all, "
                "and at least one tree"
            )
        self.prompt_lengths = np.array([len(t.prompt_ids) for t in self.trees], dtype=np.int32)
        lengths = [[len(ids) for ids in tree.completions] for tree in self.trees]
        self.completion_lengths = np.array(lengths, dtype=np.int32)
        self.prompt_skips = self._prompt_skips()
        self.labels = np.array([tree.label for tree in self.trees])
        self.positions = np.arange(len(self.trees))
        parts = [ids for tree in self.trees for ids in (tree.prompt_ids, *tree.completions)]
        self.largest_id = max(int(ids.max()) for ids in parts if len(ids))
        self.fingerprint = self._fingerprint()

    def _prompt_skips(self) -> np.ndarray | None:
        if all(tree.prompt_skips is None for tree in self.trees):
            return None
        shared = (0,) * len(self.trees[0].completions)
        return np.array([tree.prompt_skips or shared for tree in self.trees], dtype=np.int32)

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for tree in self.trees:
            digest.update(repr((tree.weight, tree.label, tree.prompt_skips)).encode())
            for ids in (tree.prompt_ids, *tree.completions):
                digest.update(np.asarray(ids, dtype=np.int32).tobytes() + b"|")
            for name, values in tree.per_completion.items():
                digest.update(name.encode() + np.asarray(values, dtype=np.float32).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, row: int) -> Tree:
        return self.trees[row]

    def __iter__(self) -> Iterator[Tree]:
        return iter(self.trees)
