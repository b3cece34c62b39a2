"""Lengths of real data sets as distributions, so that nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fasttr.batch import Tree

LONGEST = 1024  # tokens of a prompt with its completion


class LogNormal(NamedTuple):
    """Tokens: the median, and the standard deviation of the logarithm."""

    median: float
    spread: float

    def draw(self, rng: np.random.Generator, longest: int) -> int:
        return int(np.clip(rng.lognormal(np.log(self.median), self.spread), 2, longest))


class Lengths(NamedTuple):
    prompt: LogNormal
    completion: LogNormal


# Close to what tokenizers of 7B models count on these sets.
LENGTHS = {
    # Dialogues: long shared prompts, short answers of unequal length.
    "hh": Lengths(LogNormal(110.0, 0.85), LogNormal(55.0, 0.85)),
    "ultrafeedback": Lengths(LogNormal(110.0, 1.0), LogNormal(300.0, 0.65)),
    "tldr": Lengths(LogNormal(340.0, 0.45), LogNormal(35.0, 0.35)),
    "tiny": Lengths(LogNormal(8.0, 0.5), LogNormal(6.0, 0.5)),
}


def make_trees(lengths: str, rows: int, vocabulary: int, seed: int = 0) -> list[Tree]:
    """Pairs of random ids with the lengths of a data set, cut at LONGEST."""
    rng = np.random.default_rng(seed)
    distribution = LENGTHS[lengths]

    def ids(length: int) -> np.ndarray:
        return rng.integers(4, vocabulary, length).astype(np.int32)

    trees = []
    for row in range(rows):
        prompt = distribution.prompt.draw(rng, LONGEST // 2)
        chosen = distribution.completion.draw(rng, LONGEST - prompt)
        rejected = distribution.completion.draw(rng, LONGEST - prompt)
        trees.append(Tree(row, ids(prompt), (ids(chosen), ids(rejected))))
    return trees


def packed_tokens(tree: Tree) -> int:
    """Tokens of a tree in a pack: the prompt once."""
    return len(tree.prompt_ids) + sum(len(ids) for ids in tree.completions)


def counted_tokens(trees: Sequence[Tree]) -> int:
    """Tokens without padding, the prompt once per completion: the same number for every
    provider."""
    return sum(len(tree.prompt_ids) + len(ids) for tree in trees for ids in tree.completions)


def trees_filling(lengths: str, tokens: int, vocabulary: int, seed: int = 0) -> list[Tree]:
    """As many pairs as fit into `tokens` packed tokens; at least one."""
    trees: list[Tree] = []
    filled = 0
    for tree in make_trees(lengths, 2 + tokens // 4, vocabulary, seed):
        if trees and filled + packed_tokens(tree) > tokens:
            break
        trees.append(tree)
        filled += packed_tokens(tree)
    return trees
