"""How often a judge that runs here prefers a model's samples to the responses of a file: a folder
with a reward model, or a function."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fasttr.data.tokens import Messages
from fasttr.errors import FasttrError
from fasttr.evaluation.answers import prompt_and_reference
from fasttr.evaluation.verdicts import read_objects
from fasttr.metrics.results import Results
from fasttr.models.choice import Candidate
from fasttr.models.load import ModelConfig, load_model, tokenizer_of
from fasttr.rollouts.engine import TransformersEngine, as_rollout
from fasttr.rollouts.rewards import RewardInputs, check_source, reward_source
from fasttr.rollouts.sampler import Sample, Sampling, encode_prompts


def win_rate(
    model: ModelConfig,
    prompts_file: str | Path,
    judge: str,
    sampling: Sampling,
    *,
    batch_size: int,
    budget: int,
) -> Results:
    """One sample a prompt, scored beside the file's response; a tie counts 1/2.

    judge: a folder with a reward model, `module:function` of TRL's signature, or gold. budget:
    tokens of a reward model's pass. FasttrError for rows without a response, and where the judge
    gives a sample no number.
    """
    check_source(judge, key="judge")
    prompts, references = _read(prompts_file)
    tokenizer = tokenizer_of(model)
    ids = encode_prompts(tokenizer, prompts, str(prompts_file))
    tier = Candidate.named(model).support.best()
    engine = TransformersEngine(
        load_model(dataclasses.replace(model, tier=tier, is_trained=False)),
        tokenizer,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        prompts_at_once=batch_size,
    )
    rollout = engine.generate(ids, 1, sampling.seed)
    source = reward_source(judge, model, tokenizer, budget)
    own = source(RewardInputs(prompts, rollout, {}))
    written = [[_as_sample(tokenizer, text)] for text in references]
    other = source(RewardInputs(prompts, as_rollout(ids, written), {}))
    if np.isnan(own).any() or np.isnan(other).any():
        raise FasttrError(f"judge: {source.name} gives no number for a sample; wanted one for each")
    wins = np.where(own == other, 0.5, (own > other).astype(float))
    digest = hashlib.blake2b(Path(prompts_file).read_bytes(), digest_size=16).hexdigest()
    return Results(
        name=f"win_rate_{source.name}",
        title=f"win rate against the responses of {Path(prompts_file).name}, by {source.name}",
        rows=f"{digest}/{sampling}",
        values=wins.tolist(),
        no_effect=0.5,
    )


def _read(path: str | Path) -> tuple[list[str | Messages], list[str]]:
    prompts: list[str | Messages] = []
    references: list[str] = []
    for number, row in enumerate(read_objects(path, key="prompts")):
        try:
            prompt, reference = prompt_and_reference(row)
        except (KeyError, TypeError, IndexError) as error:
            raise FasttrError(
                f"prompts: {path}, row {number} (counted from 0) has no {error}; a judge needs a "
                "prompt and a response (or a chosen side)"
            ) from error
        prompts.append(prompt)
        references.append(reference)
    return prompts, references


def _as_sample(tokenizer: object, text: str) -> Sample:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    return Sample(text, len(ids) + 1, True, np.array([*ids, end], dtype=np.int32))
