"""Samples of a policy on the generated task, judged by its gold reward and by its distance from the
initial policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import Tree
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import first_fit_decreasing, pack
from fasttr.rollouts.sampler import Sampling, draw, encode_prompts
from fasttr.toy.task import gold_reward

LONGEST = 40  # tokens of a sample
TOKENS_AT_ONCE = 1024


class Mean(NamedTuple):
    """The mean of one number a sample, with its standard error."""

    value: float
    stderr: float

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        return cls(float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5)


class Judged(NamedTuple):
    """What one sample a prompt says of a policy."""

    gold: Mean  # gold reward
    kl: Mean  # KL(policy || initial), nats a completion: the samples' mean log-ratio
    length: float  # mean characters
    completions: tuple[str, ...]


def judge(policy: str | Path, initial: str | Path, prompts: Sequence[str], seed: int) -> Judged:
    """Draw one completion a prompt from the model in folder `policy` and judge them."""
    tokenizer = load_tokenizer(str(policy))
    model, anchor = (load_model(ModelConfig(str(folder))) for folder in (policy, initial))
    return judge_model(model, anchor, tokenizer, prompts, seed)


def judge_model(
    model: PackedModel, anchor: PackedModel, tokenizer: Any, prompts: Sequence[str], seed: int
) -> Judged:
    """The same of loaded models: one completion a prompt from `model`; `anchor` is the initial
    policy."""
    drawn = sample(model, tokenizer, prompts, seed)
    trees = [Tree(row, prompt, (ids,)) for row, (prompt, ids) in enumerate(drawn)]
    texts = tuple(tokenizer.decode(ids, skip_special_tokens=True) for _, ids in drawn)
    gold = [gold_reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    return Judged(
        gold=Mean.of(np.array(gold)),
        kl=Mean.of(logps(model, trees) - logps(anchor, trees)),
        length=float(np.mean([len(text) for text in texts])),
        completions=texts,
    )


def sample(
    model: PackedModel, tokenizer: Any, prompts: Sequence[str], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, completion ids) of one completion a prompt at temperature 1."""
    ids = encode_prompts(tokenizer, prompts)
    drawn = draw(model, tokenizer, ids, Sampling(LONGEST, temperature=1.0, seed=seed))
    return [(prompt, one.ids) for prompt, (one,) in zip(ids, drawn, strict=True)]


def logps(model: PackedModel, trees: Sequence[Tree]) -> np.ndarray:
    """Summed log-probs of trees with one completion, nats."""
    sizes = [len(tree.prompt_ids) + len(tree.completions[0]) for tree in trees]
    found = np.empty(len(trees))
    for members in first_fit_decreasing(sizes, TOKENS_AT_ONCE):
        found[members] = model.logps(pack([trees[i] for i in members])).numpy()
    return found
