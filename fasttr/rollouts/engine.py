"""Rollouts: completions of a policy for training, from an engine that draws them.

Legend: B prompts, m completions of a prompt, N = B m completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from fasttr.models.packed import PackedModel
from fasttr.rollouts.sampler import Sample, Sampling, draw


class Rollout(NamedTuple):
    """What a policy wrote."""

    trees: ListTrees  # a tree a prompt, the token that ended a completion included
    texts: tuple[str, ...]  # (N,) without special tokens
    finished: np.ndarray  # (N,) bool: it ended by itself

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens."""
        return self.trees.completion_lengths.reshape(-1)


class Engine(Protocol):
    """Draws completions, from the policy's own weights or from a copy of them."""

    def generate(self, prompts: Sequence[np.ndarray], m: int, seed: int) -> Rollout:
        """m completions for each tokenised prompt; the same for the same weights and seed."""
        ...

    def update(self, policy: PackedModel) -> None:
        """Take over the policy's weights."""
        ...


class TransformersEngine:
    """transformers' own generation with the policy's module itself, so that there is nothing to
    take over."""

    def __init__(
        self,
        policy: PackedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        prompts_at_once: int,
    ):
        self._policy = policy
        self._tokenizer = tokenizer
        self._sampling = Sampling(max_new_tokens, temperature)
        self._at_once = prompts_at_once

    def generate(self, prompts: Sequence[np.ndarray], m: int, seed: int) -> Rollout:
        drawn: list[list[Sample]] = []
        batches = range(0, len(prompts), self._at_once)
        for number, first in enumerate(batches):
            # Neighbouring seeds would start neighbouring batches alike.
            of_batch = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            sampling = self._sampling._replace(num_samples=m, seed=of_batch)
            some = prompts[first : first + self._at_once]
            drawn += draw(self._policy, self._tokenizer, some, sampling)
        return as_rollout(prompts, drawn)

    def update(self, policy: PackedModel) -> None:
        self._policy = policy


def as_rollout(prompts: Sequence[np.ndarray], drawn: Sequence[Sequence[Sample]]) -> Rollout:
    """Samples of prompts as trees."""
    trees = [
        Tree(row, prompt, tuple(sample.ids for sample in samples))
        for row, (prompt, samples) in enumerate(zip(prompts, drawn, strict=True))
    ]
    flat = [sample for samples in drawn for sample in samples]
    return Rollout(
        trees=ListTrees(trees),
        texts=tuple(sample.completion for sample in flat),
        finished=np.array([sample.finished for sample in flat]),
    )
