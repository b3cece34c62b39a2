"""Samples of a policy on the generated task, judged by its gold reward and by its distance from the
initial policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fasttr.batch import Tree
from fasttr.models.load import load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import first_fit_decreasing, pack
from fasttr.rollouts.sampler import Sampling, draw, encode_prompts
from fasttr.toy.task import gold_reward


class Judged(NamedTuple):
    """Means over one sample a prompt, with their standard errors."""

    gold: float  # gold reward
    gold_stderr: float
    # Estimate of KL(policy || initial), nats a completion: mean log-ratio of the policy's samples.
    kl: float
    kl_stderr: float
    length: float  # characters
    completions: tuple[str, ...]


def sample(
    model: PackedModel, tokenizer: Any, prompts: Sequence[str], seed: int, max_new_tokens: int = 40
):
    """One completion a prompt at temperature 1 through transformers' generate: (prompt ids,
    completion ids) pairs."""
    ids = encode_prompts(tokenizer, prompts)
    drawn = draw(model, tokenizer, ids, Sampling(max_new_tokens, temperature=1.0, seed=seed))
    return [(prompt, sample.ids) for prompt, (sample,) in zip(ids, drawn, strict=True)]


def judge(policy: str | Path, initial: str | Path, prompts: Sequence[str], seed: int) -> Judged:
    """Draw one completion a prompt from the model in folder `policy` and judge them."""
    cpu = torch.device("cpu")
    tokenizer = load_tokenizer(str(policy))
    model = load_model(str(policy), device=cpu)
    drawn = sample(model, tokenizer, prompts, seed)
    texts = tuple(tokenizer.decode(completion, skip_special_tokens=True) for _, completion in drawn)
    gold = np.array(
        [gold_reward(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    )
    trees = [Tree(i, prompt, (completion,)) for i, (prompt, completion) in enumerate(drawn)]
    anchor = load_model(str(initial), device=cpu)
    ratio = _logps(model, trees) - _logps(anchor, trees)
    root = len(prompts) ** 0.5
    return Judged(
        float(gold.mean()),
        float(gold.std(ddof=1)) / root,
        float(ratio.mean()),
        float(ratio.std(ddof=1)) / root,
        float(np.mean([len(text) for text in texts])),
        texts,
    )


def _logps(model: PackedModel, trees: Sequence[Tree], budget: int = 4096) -> np.ndarray:
    logp = np.empty(len(trees))
    for members in first_fit_decreasing(
        [len(t.prompt_ids) + len(t.completions[0]) for t in trees], budget
    ):
        logp[members] = model.score(pack([trees[i] for i in members])).numpy()
    return logp
