"""The one evaluation of every method: samples for the same prompts, drawn alike, judged by one gold
scorer.

Every number has a standard error over prompts, whose samples count as one.

Legend: B prompts, m samples of a prompt, N = B m samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import TreeSource
from fasttr.data.tokens import encode_texts
from fasttr.errors import FasttrError
from fasttr.losses.ratios import prefix_sums
from fasttr.models.packed import PackedModel
from fasttr.models.policy import token_logps
from fasttr.packing.plan import sweep
from fasttr.rollouts.engine import Rollout, TransformersEngine, as_rollout
from fasttr.rollouts.prompts import Prompts
from fasttr.rollouts.rewards import RewardInputs, RewardSource
from fasttr.rollouts.sampler import Sample


class JudgeSettings(NamedTuple):
    """How samples are drawn and scored."""

    samples: int  # m
    max_completion_length: int
    temperature: float
    sampling_batch_size: int
    seed: int
    label_noise: float  # of the labels that a reward model is measured by; 0: the better one wins
    budget: int  # tokens of a pack


class Judged(NamedTuple):
    """What is found of a policy."""

    metrics: dict[str, float]
    gold_B: np.ndarray  # (B,) mean gold reward of each prompt's samples, to be paired with others'


def judge(
    policy: PackedModel,
    initial: PackedModel,
    tokenizer: Any,
    prompts: Prompts,
    gold: RewardSource,
    settings: JudgeSettings,
    reward_models: Mapping[str, RewardSource] | None = None,
) -> Judged:
    """Gold reward, KL to the initial policy, length; and of reward models how well they order the
    policy's own samples.

    NAME and NAME_stderr of each: gold, kl (nats a completion), length (tokens), unfinished (share);
    win_rate where the rows have a column `response`, strict; of each reward model R: R/reward,
    R/accuracy (pairs of samples whose gold rewards differ) and R/excess_loss (Bradley-Terry loss
    beyond that of the gold labels).
    """
    rollout = draw_rollout(policy, tokenizer, prompts, settings)
    inputs = RewardInputs(prompts.raw, rollout, prompts.columns)
    gold_Bm = _by_prompt(gold(inputs), settings.samples)
    if np.isnan(gold_Bm).any():
        raise FasttrError(f"label: {gold.name} gives no reward for a sample; wanted one for each")
    # Of the distributions that samples are drawn from: at any other temperature it is no KL.
    own, before = (
        summed_logps(model, rollout.trees, settings.budget, settings.temperature)
        for model in (policy, initial)
    )
    found = _with_stderr("gold", gold_Bm)
    found |= _with_stderr("length", rollout.lengths.reshape(gold_Bm.shape))
    found |= _with_stderr("unfinished", ~rollout.finished.reshape(gold_Bm.shape))
    found |= _with_stderr("kl", own - before)
    if "response" in prompts.columns:
        theirs_B = gold(_responses(prompts, tokenizer))
        found |= _with_stderr("win_rate", gold_Bm > theirs_B[:, None])
    for name, source in (reward_models or {}).items():
        score_Bm = _by_prompt(source(inputs), settings.samples)
        found |= _with_stderr(f"{name}/reward", score_Bm)
        found |= _of_pairs(name, score_Bm, gold_Bm, settings.label_noise)
    return Judged(found, gold_Bm.mean(axis=1))


def paired(name: str, mine_B: np.ndarray, others_B: np.ndarray) -> dict[str, float]:
    """NAME and NAME_stderr: how much more of it is mine, over prompts that both were asked."""
    return _with_stderr(name, (mine_B - others_B)[:, None])


def draw_rollout(
    model: PackedModel, tokenizer: Any, prompts: Prompts, settings: JudgeSettings
) -> Rollout:
    engine = TransformersEngine(
        model,
        tokenizer,
        max_new_tokens=settings.max_completion_length,
        temperature=settings.temperature,
        prompts_at_once=settings.sampling_batch_size,
    )
    return engine.generate(prompts.ids, settings.samples, settings.seed)


def summed_logps(
    model: PackedModel,
    trees: TreeSource,
    budget: int,
    temperature: float = 1.0,
    tokens: int | None = None,
) -> np.ndarray:
    """(n, m) fp64 log-probs of completions, or of their first `tokens`; fp32 tokens are added up in
    fp64."""
    found = np.empty(trees.completion_lengths.shape)
    for batch in sweep(trees, budget):
        logp = token_logps(model, batch, temperature).cpu().numpy()
        sums = prefix_sums(logp, batch.cu_completions.diff().numpy(), tokens)
        found[list(batch.rows)] = sums.reshape(len(batch.rows), -1)
    return found


def label_pairs(
    first: np.ndarray, second: np.ndarray, noise: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(P,) whether the first is preferred, and (P,) whether there is a label at all: without noise
    equal ones have none, and one whose reward is NaN never has."""
    difference = first - second
    is_known = ~np.isnan(difference)
    if noise == 0:
        return difference > 0, is_known & (difference != 0)
    share = _logistic(np.nan_to_num(difference) / noise)
    return rng.random(len(difference)) < share, is_known


def _of_pairs(
    name: str, score_Bm: np.ndarray, gold_Bm: np.ndarray, noise: float
) -> dict[str, float]:
    """Of all pairs of samples of one prompt whose gold rewards differ."""
    right, excess = [], []
    for a, b in itertools.combinations(range(gold_Bm.shape[1]), 2):
        by_gold, by_score = gold_Bm[:, a] - gold_Bm[:, b], score_Bm[:, a] - score_Bm[:, b]
        differs = by_gold != 0
        agrees = np.where(differs, (by_score * by_gold > 0).astype(float), np.nan)
        is_better = (by_gold > 0).astype(float) if noise == 0 else _logistic(by_gold / noise)
        loss = _cross_entropy(is_better, by_score)
        least = np.zeros_like(loss) if noise == 0 else _cross_entropy(is_better, by_gold / noise)
        right.append(agrees)
        excess.append(np.where(differs, loss - least, np.nan))
    return {
        **_with_stderr(f"{name}/accuracy", np.stack(right, axis=1)),
        **_with_stderr(f"{name}/excess_loss", np.stack(excess, axis=1)),
    }


def _responses(prompts: Prompts, tokenizer: Any) -> RewardInputs:
    """The responses that the rows bring along, as if they had been drawn."""
    texts: Sequence[str] = prompts.columns["response"]
    ids = encode_texts(tokenizer, texts, add_special_tokens=False)
    ended = [np.append(one, np.int32(tokenizer.eos_token_id)) for one in ids]
    drawn = [[Sample(text, len(one), True, one)] for text, one in zip(texts, ended, strict=True)]
    return RewardInputs(prompts.raw, as_rollout(prompts.ids, drawn), prompts.columns)


def _with_stderr(name: str, values_Bm: np.ndarray) -> dict[str, float]:
    """Mean over the prompts that have a value, and its standard error."""
    values = np.asarray(values_Bm, dtype=np.float64)
    known = ~np.isnan(values).all(axis=1)
    of_prompts = np.nanmean(values[known], axis=1)
    if len(of_prompts) == 0:
        return {name: math.nan, f"{name}_stderr": math.nan}
    spread = float(of_prompts.std(ddof=1)) if len(of_prompts) > 1 else math.nan
    return {name: float(of_prompts.mean()), f"{name}_stderr": spread / math.sqrt(len(of_prompts))}


def _by_prompt(values_N: np.ndarray, m: int) -> np.ndarray:
    return values_N.reshape(-1, m)


def _logistic(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _cross_entropy(is_better: np.ndarray, margin: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, -margin) * is_better + np.logaddexp(0, margin) * (1 - is_better)
