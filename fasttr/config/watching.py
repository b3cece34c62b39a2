"""Settings of what a person watches of a run: samples, and when nothing is gained any more."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.settings import INTERVAL, at_least, setting, whole


@dataclass(frozen=True)
class SampleSettings:
    """Samples."""

    log_completions: bool = setting(
        False,
        None,
        "sample the same prompts before, during and after training, into metrics.jsonl and the "
        "report; the likeliest token each time",
        may_change=True,
    )
    log_completions_steps: float = setting(
        0.25, INTERVAL, "steps between these samples", may_change=True
    )
    log_completions_prompts: str | None = setting(
        None,
        None,
        "file of their prompts: rows with a prompt, or lines of text; none takes the first rows to "
        "evaluate on, or to train on",
        may_change=True,
    )
    log_completions_tokens: int = setting(
        128, whole(1), "most tokens of such a sample", may_change=True
    )
    num_completions_to_print: int = setting(
        4, whole(1), "how many prompts are sampled", may_change=True
    )


@dataclass(frozen=True)
class StoppingSettings:
    """Early stopping."""

    early_stopping_patience: int | None = setting(
        None,
        whole(1),
        "end the run once metric_for_best_model has not improved for so many evaluations",
        may_change=True,
    )
    early_stopping_threshold: float = setting(
        0.0, at_least(0), "how much better than the best a value must be to count", may_change=True
    )
