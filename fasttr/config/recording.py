"""Settings of what a run writes down: lines of metrics, evaluations, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.settings import (
    INTERVAL,
    at_least,
    one_of,
    setting,
    whole,
)

STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True)
class LoggingSettings:
    """Logging."""

    logging_strategy: str = setting(
        "steps", one_of(*STRATEGIES), "when to write a line of metrics", may_change=True
    )
    logging_steps: float = setting(10, INTERVAL, "steps between lines of metrics", may_change=True)
    logging_first_step: bool = setting(
        False, None, "a line after the first step too", may_change=True
    )
    report_to: str | list[str] = setting(
        "none",
        None,
        "none, or one or more of tensorboard, wandb, trackio, beside metrics.jsonl",
        may_change=True,
    )
    run_name: str | None = setting(
        None, None, "name of the run at wandb and trackio", may_change=True
    )
    project: str = setting(
        "huggingface",
        None,
        "project of the run at wandb and trackio; WANDB_PROJECT and TRACKIO_PROJECT win",
        may_change=True,
    )
    disable_tqdm: bool = setting(False, None, "no progress bars", may_change=True, in_eval=True)


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluation."""

    eval_strategy: str = setting(
        "no", one_of(*STRATEGIES), "when to evaluate; with steps the last one is evaluated too"
    )
    eval_steps: float | None = setting(
        None, INTERVAL, "steps between evaluations; none means logging_steps"
    )
    eval_delay: float = setting(
        0,
        at_least(0),
        "no evaluation before this many steps, or epochs with eval_strategy epoch",
    )
    eval_on_start: bool = setting(False, None, "evaluate before the first step")


@dataclass(frozen=True)
class SavingSettings:
    """Output and checkpoints."""

    output_dir: str = setting(
        "trainer_output",
        None,
        "folder for checkpoints, metrics and the final model",
        may_change=True,
    )
    overwrite_output_dir: bool = setting(
        False, None, "start over in a folder that already holds a run", may_change=True
    )
    resume_from_checkpoint: bool | str | None = setting(
        None, None, "true for the newest in output_dir, or a folder", may_change=True
    )
    save_strategy: str = setting(
        "steps",
        one_of(*STRATEGIES, "best"),
        "when to save a checkpoint; the last step is saved with steps and epoch",
        may_change=True,
    )
    save_steps: float = setting(500, INTERVAL, "steps between checkpoints", may_change=True)
    save_total_limit: int | None = setting(
        None,
        whole(1),
        "how many checkpoints are kept; the best one always is, and none keeps all",
        may_change=True,
    )
    save_in_background: bool | None = setting(
        None,
        None,
        "with divided weights (shard_size), go on training while a checkpoint is written; none "
        "means on CUDA",
        may_change=True,
    )
    save_only_model: bool = setting(
        False, None, "checkpoints without what resuming needs", may_change=True
    )
    push_to_hub: bool = setting(
        False, None, "upload the model to the hub as hub_strategy says", may_change=True
    )
    hub_model_id: str | None = setting(
        None, None, "repository of the hub; none means the name of output_dir", may_change=True
    )
    hub_strategy: str = setting(
        "every_save",
        one_of("end", "every_save", "checkpoint", "all_checkpoints"),
        "what is uploaded: the final model; the model of each checkpoint too; the newest "
        "checkpoint, to resume from, beside it; or all of them",
        may_change=True,
    )
    hub_token: str | None = setting(
        None, None, "access token of the hub; none means that of hf auth login", may_change=True
    )
    hub_private_repo: bool | None = setting(
        None, None, "make the repository private where it is new", may_change=True
    )
    hub_always_push: bool = setting(
        False, None, "upload also while an earlier upload is under way", may_change=True
    )
    hub_revision: str | None = setting(
        None, None, "branch of the repository; none means its main one", may_change=True
    )
    load_best_model_at_end: bool = setting(
        False, None, "the final model is the best of the checkpoints"
    )
    metric_for_best_model: str | None = setting(
        None, None, "what best means, such as loss or rewards/margins; none means loss"
    )
    greater_is_better: bool | None = setting(
        None,
        None,
        "whether a larger value is better; none means not for a metric that ends in loss",
    )
