"""`log_completions`: what the policy writes for the same prompts before, during and after training.

The likeliest token is taken each time, so that samples differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttr.config.train_config import TrainConfig
from fasttr.console import counted, say
from fasttr.rollouts.prompt_file import check_lengths, read_prompts
from fasttr.rollouts.sampler import Sample, Sampling, draw, encode_prompts
from fasttr.training.intervals import Interval
from fasttr.training.run import Run

SHOWN = 76  # characters of a sample in a line


@dataclass
class Completions:
    """The prompts of a run, and when they are sampled."""

    prompts: list[str]
    ids: list[np.ndarray]
    interval: Interval
    sampling: Sampling
    drawn_at: int | None = None  # the last step

    @classmethod
    def of(cls, run: Run) -> Completions | None:
        """None where none are asked for."""
        config = run.config
        if not config.log_completions:
            return None
        texts, ids = _chosen_prompts(run, config)
        sampling = Sampling(config.log_completions_tokens, temperature=0.0, seed=config.seed)
        check_lengths(run.policy, ids, sampling, key="log_completions_tokens")
        return cls(texts, ids, Interval("steps", config.log_completions_steps), sampling)

    def is_due(self, run: Run) -> bool:
        """Before the first step, every so often, and after the last one."""
        is_edge = run.step in (0, run.plan.total_steps)
        return is_edge or self.interval.is_due(run.step, run.plan)

    def draw(self, run: Run) -> dict[str, Any]:
        """A line of metrics with the samples; all ranks draw them alike."""
        self.drawn_at = run.step
        # Compiled layers have graphs for packs, and none for one token after the other.
        with torch.compiler.set_stance("force_eager"):
            drawn = draw(run.policy, run.tokenizer, self.ids, self.sampling)
        samples = [of_prompt[0] for of_prompt in drawn]
        line = _as_line(self.prompts, samples)
        say(
            f"samples of {counted(len(samples), 'prompt')} at step {run.step}: "
            f"{line['completions/mean_length']:.1f} tokens on average"
        )
        say(f"  {self.prompts[0]!r:.{SHOWN}}")
        say(f"    {samples[0].completion!r:.{SHOWN - 2}}")
        return line


def _as_line(prompts: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "event": "completions",
        "completions": [
            {
                "prompt": prompt,
                "completion": sample.completion,
                "tokens": sample.tokens,
                "finished": sample.finished,
            }
            for prompt, sample in zip(prompts, samples, strict=True)
        ],
        "completions/mean_length": float(np.mean([sample.tokens for sample in samples])),
        "completions/clipped_ratio": float(np.mean([not sample.finished for sample in samples])),
    }


def _chosen_prompts(run: Run, config: TrainConfig) -> tuple[list[str], list[np.ndarray]]:
    """Texts and token ids: of a file, or the first different ones of the rows to evaluate on, or to
    train on."""
    most = config.num_completions_to_print
    if config.log_completions_prompts is not None:
        path = Path(config.log_completions_prompts)
        given = read_prompts(path, key="log_completions_prompts")[:most]
        ids = encode_prompts(run.tokenizer, given, str(path))
    else:
        trees = next((split.trees for split in run.splits.values()), run.trees)
        ids = []
        for row in range(len(trees)):
            prompt_ids = trees[row].prompt_ids
            if not any(np.array_equal(prompt_ids, other) for other in ids):
                ids.append(prompt_ids)
            if len(ids) == most:
                break
    texts = [run.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    return texts, ids
