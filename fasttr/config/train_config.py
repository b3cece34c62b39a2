"""The configuration of a run: TRL's names and defaults wherever the meaning is TRL's, ours beside
them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fasttr.config.rules import check
from fasttr.errors import FasttrError
from fasttr.losses import Loss, Weighted, make_loss
from fasttr.reference.moving import Fixed, Hard, Schedule, Soft

# Settings that may change when a run is resumed: they do not touch what is computed.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "logging_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "run_name",
        "project",
        "overwrite_output_dir",
        "disable_tqdm",
        "dataset_num_proc",
        "max_dropped_fraction",
        "max_boundary_mismatch",
        "logging_strategy",
        "logging_first_step",
        "save_only_model",
    }
)

# What losses read beside their names.
LOSS_SETTINGS = (
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "simpo_gamma",
    "desirable_weight",
    "undesirable_weight",
)

# The settings of the TR paper (arXiv:2404.09656), one preset for each of its two updates.
_PAPER = {
    "beta": 0.05,
    "learning_rate": 1e-6,
    "num_train_epochs": 1.0,
    "max_length": 1024,
    "max_grad_norm": 2.0,
    "warmup_steps": 100.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tr-soft": {**_PAPER, "ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 64},
    "tr-hard": {**_PAPER, "ref_update": "hard", "ref_update_every": 512},
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `fasttr train`.

    Args:
        model_name_or_path: hub id or folder of the policy; its weights are held in float32.
        model_revision: branch, tag or commit of a hub model.
        disable_dropout: false is refused for a model with dropout, since dropout is off in both
            models.
        dataset_name: hub id, folder or file (json, jsonl, parquet, also gz) of preference rows.
        datasets: a mixture, which wins over dataset_name: a list of path, name, data_dir,
            data_files, split, columns, fraction; fraction is for all or none, and nothing is used
            twice.
        test_split_size: rows of the mixture, or a share below 1, set aside as its test split, drawn
            from seed.
        dataset_config: configuration of a hub data set.
        dataset_train_split: split to train on.
        dataset_test_split: split to evaluate on.
        dataset_format: none reads the columns as TRL does; hh_rlhf splits raw transcripts at the
            last Assistant turn.
        dataset_num_proc: processes for tokenising.
        eval_dataset_name: data set to evaluate on; none means the test split of dataset_name.
        weight_column: column of row weights that multiply the loss.
        max_length: prompt and completion together, in tokens; none cuts nothing.
        max_dropped_fraction: stop when more rows than this are dropped.
        max_boundary_mismatch: stop when more rows than this merge a token across the prompt's end.
        output_dir: folder for checkpoints, metrics and the final model.
        overwrite_output_dir: start over in a folder that already holds a run.
        loss_type: name of a loss, or a list of names whose losses are summed; absent means sigmoid
            for pairs and kto for unpaired rows.
        loss_weights: weight of each loss of a list; none means 1.
        beta: strength of the pull towards the reference; tau of ipo.
        label_smoothing: share of wrong labels that cdpo, robust, exo_pair, aot and aot_unpaired
            expect.
        f_divergence_type: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha_divergence_coef: alpha of alpha_divergence.
        ld_alpha: weight of the log-probs beyond the length of a pair's shorter side; none means 1.
        discopop_tau: temperature of discopop.
        simpo_gamma: target margin of simpo.
        desirable_weight: factor on the losses of desirable rows.
        undesirable_weight: factor on the losses of undesirable rows.
        group_size: rows whose losses are computed together where a loss couples rows; none means
            train_batch_size.
        ref_update: how the reference moves: none, soft or hard.
        ref_update_alpha: share of the policy in a soft update.
        ref_update_every: optimizer steps between updates.
        ref_model_name_or_path: another model as the first reference; none means the policy at its
            start.
        train_sampling_strategy: random (TRL's permutation) or sequential, the order of the data.
        dataloader_drop_last: leave out an epoch's last rows that do not fill group_size, or a step
            without one.
        train_batch_size: rows per optimizer step.
        max_tokens_per_batch: tokens per forward pass; memory follows it, results do not. Absent
            means 8192 on CUDA and 1024 on a CPU, where larger passes are not faster.
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
        tf32: TF32 in float32 products on CUDA; none leaves torch's setting.
        dtype: dtype of weights and optimizer; float32 alone.
        gradient_checkpointing: recompute activations in the backward pass.
        attn_implementation: none picks; sdpa, eager, varlen, flash_attention_2.
        use_liger_kernel: Liger's norm, rotary and MLP kernels; absent means where CUDA and
            liger-kernel are present.
        logging_strategy: no, steps or epoch.
        logging_steps: steps between lines of metrics; below 1 a share of all steps.
        logging_first_step: a line after the first step too.
        eval_strategy: no, steps or epoch; with steps the last one is evaluated too.
        eval_steps: steps between evaluations, below 1 a share of all steps; none means
            logging_steps.
        eval_delay: no evaluation before this many steps, or epochs with eval_strategy epoch.
        eval_on_start: evaluate before the first step.
        save_strategy: no, steps, epoch or best; the last step is saved with steps and epoch.
        save_steps: steps between checkpoints; below 1 a share of all steps.
        save_total_limit: how many checkpoints are kept; the best one always is.
        save_only_model: checkpoints without what resuming needs.
        load_best_model_at_end: the final model is the best of the checkpoints.
        metric_for_best_model: what best means, such as loss or rewards/margins; none means loss.
        greater_is_better: whether a larger value is better; none means not for a metric that ends
            in loss.
        resume_from_checkpoint: true for the newest in output_dir, or a folder.
        report_to: none, or one or more of tensorboard, wandb, trackio, beside metrics.jsonl.
        run_name: name of the run at wandb and trackio.
        project: project of the run at wandb and trackio; WANDB_PROJECT and TRACKIO_PROJECT win.
        full_determinism: deterministic CUDA kernels, slower.
        use_cpu: train on the CPU even when there is a GPU.
        disable_tqdm: no progress bars.
    """

    model_name_or_path: str
    model_revision: str = "main"
    disable_dropout: bool = True
    dataset_name: str | None = None
    datasets: list[dict[str, Any]] | None = None
    test_split_size: float | None = None
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
    loss_type: str | list[str] | None = None
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    group_size: int | None = None
    ref_update: Literal["none", "soft", "hard"] = "none"
    ref_update_alpha: float = 0.6
    ref_update_every: int = 512
    ref_model_name_or_path: str | None = None
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    dataloader_drop_last: bool = False
    train_batch_size: int = 8
    max_tokens_per_batch: int | None = None
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
    tf32: bool | None = None
    dtype: str = "float32"
    gradient_checkpointing: bool = True
    attn_implementation: str | None = None
    use_liger_kernel: bool | None = None
    logging_strategy: Literal["no", "steps", "epoch"] = "steps"
    logging_steps: float = 10
    logging_first_step: bool = False
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: float | None = None
    eval_delay: float = 0
    eval_on_start: bool = False
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: float = 500
    save_total_limit: int | None = None
    save_only_model: bool = False
    load_best_model_at_end: bool = False
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    resume_from_checkpoint: bool | str | None = None
    report_to: str | list[str] = "none"
    run_name: str | None = None
    project: str = "huggingface"
    full_determinism: bool = False
    use_cpu: bool = False
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        if (
            isinstance(self.loss_type, list)
            and len(self.loss_type) == 1
            and self.loss_weights is None
        ):
            object.__setattr__(self, "loss_type", self.loss_type[0])
        check(self)

    @property
    def loss(self) -> Loss | Weighted:
        """The loss of `loss_type`; that of pairs while it is absent and the rows are not known."""
        names = ["sigmoid"] if self.loss_type is None else self.loss_type
        settings = {key: getattr(self, key) for key in LOSS_SETTINGS}
        try:
            return make_loss(
                [names] if isinstance(names, str) else names, self.loss_weights, **settings
            )
        except ValueError as error:
            raise FasttrError(str(error)) from error

    def token_budget(self, device: torch.device) -> int:
        return self.max_tokens_per_batch or (8192 if device.type == "cuda" else 1024)

    @property
    def loss_name(self) -> str:
        return (
            self.loss_type
            if isinstance(self.loss_type, str)
            else " + ".join(self.loss_type or ["sigmoid"])
        )

    @property
    def group_rows(self) -> int:
        """Rows that must share a pack: the group of a loss that couples rows, else one."""
        return (self.group_size or self.train_batch_size) if self.loss.coupled else 1

    @property
    def schedule(self) -> Schedule:
        if self.ref_update == "soft":
            return Soft(self.ref_update_alpha, self.ref_update_every)
        return Hard(self.ref_update_every) if self.ref_update == "hard" else Fixed()

    @property
    def best_metric(self) -> str:
        """Key of metrics.jsonl that says which checkpoint is best."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    @property
    def more_is_better(self) -> bool:
        return (
            not self.best_metric.endswith("loss")
            if self.greater_is_better is None
            else self.greater_is_better
        )

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
