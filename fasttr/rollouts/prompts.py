"""The prompts of on-policy training, and which of them make which rollout.

Legend: n prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fasttr.console import say
from fasttr.data.reading import read_prompt
from fasttr.data.tokens import Messages
from fasttr.errors import FasttrError
from fasttr.packing.plan import epoch_order
from fasttr.rollouts.sampler import encode_prompts

PROMPT = "prompt"


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts with the further columns of their rows."""

    raw: Sequence[str | Messages]  # (n,)
    ids: Sequence[np.ndarray]  # (n,) int32 each
    columns: Mapping[str, Sequence[Any]]  # name -> (n,)
    positions: np.ndarray  # (n,) place of each in the data as it was read
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def picked(self, rows: np.ndarray) -> Prompts:
        """Some of them, in a given order, under the fingerprint of all."""
        some = rows.tolist()
        return replace(
            self,
            raw=[self.raw[row] for row in some],
            ids=[self.ids[row] for row in some],
            columns={name: [one[row] for row in some] for name, one in self.columns.items()},
            positions=self.positions[rows],
        )


def encode(tokenizer: Any, rows: Any, name: str, longest: int | None) -> tuple[Prompts, int]:
    """Prompts of rows with a column `prompt`, and how many were dropped: those of more than
    `longest` tokens. FasttrError names the row at fault."""
    names = list(rows.column_names) if hasattr(rows, "column_names") else list(rows[0])
    if PROMPT not in names:
        raise FasttrError(
            f"{name}: has no column 'prompt': it has {', '.join(map(repr, names))}; wanted text, "
            "or lists of messages"
        )
    raw: list[str | Messages] = []
    others: dict[str, list[Any]] = {other: [] for other in names if other != PROMPT}
    for number, row in enumerate(rows):
        raw.append(read_prompt(number, row[PROMPT]))
        for other, values in others.items():
            values.append(row[other])
    kinds = {isinstance(prompt, str) for prompt in raw}
    if len(kinds) > 1:
        raise FasttrError(f"{name}: some prompts are text and some messages; wanted one of them")
    ids = encode_prompts(tokenizer, raw, name)
    kept = [i for i, one in enumerate(ids) if longest is None or len(one) <= longest]
    if not kept:
        raise FasttrError(f"{name}: every prompt has more than {longest} tokens")
    digest = hashlib.blake2b(digest_size=16)
    for i in kept:
        told = json.dumps({other: values[i] for other, values in others.items()}, default=str)
        digest.update(ids[i].tobytes() + b"|" + told.encode())
    prompts = Prompts(
        raw=[raw[i] for i in kept],
        ids=[ids[i] for i in kept],
        columns={other: [values[i] for i in kept] for other, values in others.items()},
        positions=np.array(kept),
        fingerprint=digest.hexdigest(),
    )
    return prompts, len(ids) - len(kept)


def with_room(
    tokenizer: Any, rows: Any, name: str, hf_config: Any, max_completion_length: int
) -> Prompts:
    """The prompts that leave room for a completion among the model's positions; says how many were
    read and dropped."""
    # Some models need no such number.
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    longest = None if positions is None else positions - max_completion_length
    if longest is not None and longest < 1:
        raise FasttrError(
            f"max_completion_length: got {max_completion_length}, and the model has {positions} "
            "positions; wanted room for a prompt"
        )
    prompts, dropped = encode(tokenizer, rows, name, longest)
    say(f"read {len(prompts) + dropped} prompts of {name}, kept {len(prompts)}")
    if dropped:
        say(f"  dropped {dropped}: longer than {longest} tokens")
    return prompts


@dataclass(frozen=True)
class RolloutPlan:
    """Which prompts make which rollout, and which steps it feeds: a pure function of its fields.

    An epoch's last prompts that do not fill a rollout are left out.
    """

    trees: Prompts  # what a run's rows are, here prompts
    prompts_per_step: int
    steps_per_generation: int
    num_iterations: int
    total_steps: int
    seed: int
    shuffle: bool

    @property
    def prompts_per_rollout(self) -> int:
        return self.prompts_per_step * self.steps_per_generation

    @property
    def steps_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def steps_per_epoch(self) -> int:
        return len(self.trees) // self.prompts_per_rollout * self.steps_per_rollout

    def rows(self, step: int) -> np.ndarray:
        """The prompts of optimizer step `step` (counted from 0)."""
        rollout, within = divmod(step, self.steps_per_rollout)
        return self.of_rollout(rollout)[self.places(within)]

    def places(self, within: int) -> np.ndarray:
        """Which prompts of a rollout make its step number `within`."""
        first = within % self.steps_per_generation * self.prompts_per_step
        return np.arange(first, first + self.prompts_per_step)

    def of_rollout(self, rollout: int) -> np.ndarray:
        """The prompts of a rollout, in its order."""
        epoch, within = divmod(rollout, len(self.trees) // self.prompts_per_rollout)
        order = np.arange(len(self.trees))
        if self.shuffle:
            order = epoch_order(len(self.trees), self.seed, epoch)
        first = within * self.prompts_per_rollout
        return order[first : first + self.prompts_per_rollout]
