"""Settings that `fasttr eval` has beside those of a run."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.settings import at_least, setting, whole


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
        None, None, "file of prompts to draw samples for: rows with a prompt, or lines of text"
    )
    samples_file: str | None = setting(None, None, "JSON lines to write the samples to")
    max_new_tokens: int = setting(256, whole(1), "most tokens of a sample")
    temperature: float = setting(1.0, at_least(0), "0 takes the likeliest token each time")
    num_samples: int = setting(1, whole(1), "samples for each prompt")
    sampling_batch_size: int = setting(16, whole(1), "prompts drawn for at once")
    sampling_seed: int = setting(42, None, "seed of the samples")


@dataclass(frozen=True)
class EvalSettings(SamplingSettings, MeasureSettings):
    """What `fasttr eval` alone reads."""
