"""Settings that `fasttr eval` has beside those of a run."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.settings import at_least, one_of, setting, whole

# Files of answers and of verdicts; see fasttr.evaluation.answers and verdicts.
JUDGED_FORMATS = ("alpaca_eval", "arena_hard", "mt_bench", "pairwise")


@dataclass(frozen=True)
class MeasureSettings:
    """Measuring."""

    anchor_model_name_or_path: str | None = setting(
        None, None, "fixed model that log-ratios are taken against, a folder or hub id"
    )
    output_file: str | None = setting(None, None, "also write the numbers as JSON")


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling."""

    prompts: str | None = setting(
        None,
        None,
        "file of prompts to draw samples for: rows with a prompt, lines of text, or the questions "
        "of a benchmark",
    )
    samples_file: str | None = setting(None, None, "file to write the samples to")
    samples_format: str = setting(
        "lines",
        one_of("lines", *JUDGED_FORMATS),
        "JSON lines of samples; the file that AlpacaEval 2, Arena-Hard or MT-Bench judges; or, for "
        "prompts with a response, two prompts of each for a pairwise judge, positions swapped",
    )
    generator: str | None = setting(
        None, None, "the model's name in such a file; none means that of its folder"
    )
    judge_template: str = setting(
        "helpful",
        None,
        "of samples_format pairwise: helpful (Anthropic-HH), summary (TL;DR), or a file with "
        "{prompt}, {a} and {b}",
    )
    max_new_tokens: int = setting(256, whole(1), "most tokens of a sample")
    temperature: float = setting(1.0, at_least(0), "0 takes the likeliest token each time")
    num_samples: int = setting(1, whole(1), "samples for each prompt")
    sampling_batch_size: int = setting(16, whole(1), "prompts drawn for at once")
    sampling_seed: int = setting(42, None, "seed of the samples")


@dataclass(frozen=True)
class JudgeSettings:
    """Judges."""

    judge: str | None = setting(
        None,
        None,
        "win rate of a sample a prompt against the response of its row, by a reward model's folder "
        "or module:function",
    )
    verdicts: str | None = setting(
        None, None, "file of a judge's verdicts to read; no model is needed for that"
    )
    verdicts_format: str | None = setting(None, one_of(*JUDGED_FORMATS), "who wrote it")
    length_control_file: str | None = setting(
        None, None, "AlpacaEval's df_gamed.csv, for its length-controlled win rate"
    )
    results_dir: str | None = setting(
        None, None, "output_dir of the run whose report is to show what judges said"
    )


@dataclass(frozen=True)
class EvalSettings(JudgeSettings, SamplingSettings, MeasureSettings):
    """What `fasttr eval` alone reads."""
