"""The configuration of a run: TRL's names and defaults wherever the meaning is TRL's, ours beside them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from fasttr.errors import FasttrError
from fasttr.losses import LOSSES, Loss
from fasttr.optim import NO_SCHEDULE
from fasttr.reference import Fixed, Hard, Schedule, Soft

# Settings that may change when a run is resumed: they do not touch what is computed.
FREE_ON_RESUME = frozenset({
    "output_dir", "logging_steps", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "report_to", "overwrite_output_dir", "disable_tqdm", "dataset_num_proc", "max_dropped_fraction",
    "max_boundary_mismatch",
})  # fmt: skip

# The settings of the TR paper (arXiv:2404.09656), one preset for each of its two updates.
_PAPER = {"beta": 0.05, "learning_rate": 1e-6, "num_train_epochs": 1.0, "max_length": 1024, "max_grad_norm": 2.0,
          "warmup_steps": 100.0}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "tr-soft": {**_PAPER, "ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 64},
    "tr-hard": {**_PAPER, "ref_update": "hard", "ref_update_every": 512},
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fasttr train`.

    Args:
        model_name_or_path: hub id or folder of the policy; its weights are held in float32.
        dataset_name: hub id, folder or file (json, jsonl, parquet, also gz) of preference rows.
        dataset_config: configuration of a hub data set.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on.
        dataset_format: none reads the columns as TRL does; hh_rlhf splits raw transcripts at the last Assistant turn.
        dataset_num_proc: processes for tokenising.
        eval_dataset_name: data set to evaluate on; none means the test split of dataset_name.
        weight_column: column of row weights that multiply the loss.
        max_length: prompt and completion together, in tokens; none cuts nothing.
        max_dropped_fraction: stop when more rows than this are dropped.
        max_boundary_mismatch: stop when more rows than this merge a token across the prompt's end.
        output_dir: folder for checkpoints, metrics and the final model.
        overwrite_output_dir: start over in a folder that already holds a run.
        loss_type: sigmoid (DPO), ipo (per-token averages), ipo_sum (sums) or sft.
        beta: strength of the pull towards the reference; tau of ipo.
        ref_update: how the reference moves: none, soft or hard.
        ref_update_alpha: share of the policy in a soft update.
        ref_update_every: optimizer steps between updates.
        ref_model_name_or_path: another model as the first reference; none means the policy at its start.
        train_batch_size: rows per optimizer step.
        max_tokens_per_batch: tokens per forward pass; memory follows it, results do not.
        learning_rate: peak rate of AdamW.
        lr_scheduler_type: name of a transformers schedule.
        lr_scheduler_kwargs: further arguments of that schedule.
        warmup_steps: steps of warm-up; below 1 a share of all steps.
        weight_decay: decoupled decay; biases and norms have none.
        adam_beta1: decay of AdamW's first moment.
        adam_beta2: decay of AdamW's second moment.
        adam_epsilon: AdamW's epsilon.
        max_steps: optimizer steps; above 0 it wins over num_train_epochs.
        num_train_epochs: passes over the data, may be a fraction.
        max_grad_norm: clip the gradient's norm to this; 0 clips nothing.
        seed: seed of everything random.
        data_seed: seed of the order of rows; none means seed.
        bf16: compute in bfloat16; absent means true on CUDA and false on a CPU.
        dtype: dtype of weights and optimizer; float32 alone.
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: none picks; sdpa, eager, varlen, flash_attention_2.
        use_liger_kernel: Liger's norm, rotary and MLP kernels; absent means where CUDA and liger-kernel are present.
        logging_steps: steps between lines of metrics.
        eval_strategy: no, steps or epoch.
        eval_steps: steps between evaluations; none means logging_steps.
        eval_on_start: evaluate before the first step.
        save_strategy: no, steps or epoch; the last step is saved unless no.
        save_steps: steps between checkpoints.
        save_total_limit: how many checkpoints are kept.
        resume_from_checkpoint: true for the newest in output_dir, or a folder.
        report_to: none or tensorboard, beside metrics.jsonl.
        full_determinism: deterministic CUDA kernels, slower.
        use_cpu: train on the CPU even when there is a GPU.
        disable_tqdm: no progress bars.
    """

    model_name_or_path: str
    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    dataset_format: Literal["hh_rlhf"] | None = None
    dataset_num_proc: int | None = None
    eval_dataset_name: str | None = None
    weight_column: str | None = None
    max_length: int | None = 1024
    max_dropped_fraction: float = 1.0
    max_boundary_mismatch: float | None = None
    output_dir: str = "trainer_output"
    overwrite_output_dir: bool = False
    loss_type: str | list[str] = "sigmoid"
    beta: float = 0.1
    ref_update: Literal["none", "soft", "hard"] = "none"
    ref_update_alpha: float = 0.6
    ref_update_every: int = 512
    ref_model_name_or_path: str | None = None
    train_batch_size: int = 8
    max_tokens_per_batch: int = 8192
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_steps: int = -1
    num_train_epochs: float = 3.0
    max_grad_norm: float = 1.0
    seed: int = 42
    data_seed: int | None = None
    bf16: bool | None = None
    dtype: str = "float32"
    gradient_checkpointing: bool = True
    attn_implementation: str | None = None
    use_liger_kernel: bool | None = None
    logging_steps: int = 10
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: int | None = None
    eval_on_start: bool = False
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: int = 500
    save_total_limit: int | None = None
    resume_from_checkpoint: bool | str | None = None
    report_to: str = "none"
    full_determinism: bool = False
    use_cpu: bool = False
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, list):
            if len(self.loss_type) != 1:
                raise FasttrError(f"loss_type: got the list {self.loss_type}; wanted one name")
            object.__setattr__(self, "loss_type", self.loss_type[0])
        _check(self)

    @property
    def loss(self) -> Loss:
        return LOSSES[str(self.loss_type)](beta=self.beta)  # type: ignore[call-arg]

    @property
    def schedule(self) -> Schedule:
        if self.ref_update == "soft":
            return Soft(self.ref_update_alpha, self.ref_update_every)
        return Hard(self.ref_update_every) if self.ref_update == "hard" else Fixed()

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Settings that bind a resumed run and differ from `saved`, as `key: saved -> now`."""
        now = self.as_dict()
        return [
            f"{key}: {saved.get(key)!r} -> {now[key]!r}"
            for key in now
            if key not in FREE_ON_RESUME and saved.get(key) != now[key]
        ]


def _check(c: TrainConfig) -> None:
    """Every value in its range, and no setting that contradicts another."""
    if not isinstance(c.loss_type, str) or c.loss_type not in LOSSES:
        raise FasttrError(f"loss_type: got {c.loss_type!r}; wanted one of {', '.join(LOSSES)}")
    ranges: list[tuple[str, bool, str]] = [
        ("beta", c.beta > 0 and math.isfinite(c.beta), "a number above 0"),
        ("ref_update_alpha", 0 <= c.ref_update_alpha <= 1, "a number from 0 to 1"),
        ("ref_update_every", c.ref_update_every >= 1, "a whole number from 1"),
        ("train_batch_size", c.train_batch_size >= 1, "a whole number from 1"),
        ("max_tokens_per_batch", c.max_tokens_per_batch >= 1, "a whole number from 1"),
        ("max_length", c.max_length is None or c.max_length >= 2, "a whole number from 2, or none"),
        ("learning_rate", c.learning_rate >= 0 and math.isfinite(c.learning_rate), "a number from 0"),
        ("warmup_steps", c.warmup_steps >= 0, "a number from 0"),
        ("weight_decay", c.weight_decay >= 0, "a number from 0"),
        ("adam_beta1", 0 <= c.adam_beta1 < 1, "a number from 0 to below 1"),
        ("adam_beta2", 0 <= c.adam_beta2 < 1, "a number from 0 to below 1"),
        ("adam_epsilon", c.adam_epsilon > 0, "a number above 0"),
        ("max_steps", c.max_steps == -1 or c.max_steps >= 1, "a whole number from 1, or -1 for num_train_epochs"),
        ("num_train_epochs", c.num_train_epochs > 0 and math.isfinite(c.num_train_epochs), "a number above 0"),
        ("max_grad_norm", c.max_grad_norm >= 0, "a number from 0 (0 clips nothing)"),
        ("logging_steps", c.logging_steps >= 1, "a whole number from 1"),
        ("eval_steps", c.eval_steps is None or c.eval_steps >= 1, "a whole number from 1"),
        ("save_steps", c.save_steps >= 1, "a whole number from 1"),
        ("save_total_limit", c.save_total_limit is None or c.save_total_limit >= 1, "a whole number from 1"),
        ("max_dropped_fraction", 0 <= c.max_dropped_fraction <= 1, "a number from 0 to 1"),
        ("report_to", c.report_to in ("none", "tensorboard"), "none or tensorboard"),
        ("lr_scheduler_type", c.lr_scheduler_type not in NO_SCHEDULE, "a schedule that is known before training"),
        ("dtype", c.dtype == "float32", "float32: weights and optimizer stay in it, bf16: true computes in bfloat16"),
        ("seed", c.seed >= 0, "a whole number from 0"),
        ("data_seed", c.data_seed is None or c.data_seed >= 0, "a whole number from 0"),
    ]
    for key, good, wanted in ranges:
        if not good:
            raise FasttrError(f"{key}: got {getattr(c, key)!r}; wanted {wanted}")
    if c.ref_update != "none" and not LOSSES[c.loss_type].needs_reference:
        raise FasttrError(
            f"ref_update: got {c.ref_update}, but loss_type {c.loss_type} has no reference; wanted ref_update none"
        )
    if c.ref_model_name_or_path is not None and not LOSSES[c.loss_type].needs_reference:
        raise FasttrError(f"ref_model_name_or_path: loss_type {c.loss_type} has no reference; leave it out")
