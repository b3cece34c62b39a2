"""The configuration of a run on preferences.

Names and defaults are TRL's wherever the meaning is TRL's; ours stand beside them. The
configuration
hands on small ones: what reads rows, loads a model or steps an optimizer never sees it whole.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from fasttr.batch import TreeSource
from fasttr.config import rules
from fasttr.config.common import (
    ComputeSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    StepSettings,
)
from fasttr.config.losses import LossSettings, ReferenceSettings
from fasttr.config.recording import EvaluationSettings, LoggingSettings, SavingSettings
from fasttr.config.scale import AdapterSettings, LaunchSettings
from fasttr.config.watching import SampleSettings, StoppingSettings
from fasttr.data.load import DataConfig
from fasttr.distributed.launchers import Sharding, of_environment
from fasttr.errors import FasttrError
from fasttr.losses import BaseLoss, Loss, Objective, WeightedSum, Wpo, make_loss
from fasttr.metrics.trackers import TrackerConfig
from fasttr.models.load import ModelConfig
from fasttr.models.lora import AdapterConfig
from fasttr.models.quantised import Quantisation
from fasttr.models.sharded import Layout
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.plan import Plan
from fasttr.packing.tiers import AUTO, SHARED
from fasttr.reference.low_rank import RankBound
from fasttr.reference.schedule import Fixed, Hard, Schedule, Soft
from fasttr.settings import (
    check_ranges,
    described,
    settings_of,
)

# What the memory plan says where a configuration does not; and what was meant before there was one.
PLANNED = (
    "ref_on_host",
    "adam_moments",
    "gradient_checkpointing",
    "activation_memory_budget",
    "max_tokens_per_batch",
)
BEFORE_PLANS = {"adam_moments": "fp32", "gradient_checkpointing": True}

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
WPO_SETTINGS = ("use_weighting", "wpo_max_weight")

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
class TrainConfig(
    SavingSettings,
    StoppingSettings,
    EvaluationSettings,
    SampleSettings,
    LoggingSettings,
    LaunchSettings,
    ComputeSettings,
    OptimizerSettings,
    StepSettings,
    ReferenceSettings,
    LossSettings,
    DataSettings,
    AdapterSettings,
    ModelSettings,
):
    """Settings of a run on preferences: `fasttr train` and `fasttr.train`."""

    def __post_init__(self) -> None:
        names = self.loss_type
        if isinstance(names, list) and len(names) == 1 and self.loss_weights is None:
            object.__setattr__(self, "loss_type", names[0])
        check_ranges(self)
        rules.check(self)

    @property
    def loss_names(self) -> list[str]:
        """Names of the loss; that of pairs while it is absent and the rows are not known."""
        names = "sigmoid" if self.loss_type is None else self.loss_type
        return [names] if isinstance(names, str) else names

    @property
    def loss(self) -> Loss:
        settings = {key: getattr(self, key) for key in LOSS_SETTINGS + WPO_SETTINGS}
        try:
            return make_loss(self.loss_names, self.loss_weights, **settings)
        except ValueError as error:
            raise FasttrError(str(error)) from error

    def unread_loss_settings(self, loss: Loss) -> list[str]:
        """Settings of losses that are off their defaults and that none of `loss` reads."""
        weighed = loss.loss if isinstance(loss, Wpo) else loss
        parts = weighed.losses if isinstance(weighed, WeightedSum) else (weighed,)
        if not all(isinstance(part, BaseLoss) for part in parts):
            return []  # a loss of one's own: nobody knows what it reads
        read = {field.name for part in parts for field in dataclasses.fields(part)}  # type: ignore[arg-type]
        defaults = settings_of(type(self))
        return [
            name
            for name in LOSS_SETTINGS
            if name not in read and getattr(self, name) != defaults[name].default
        ]

    @property
    def schedule(self) -> Schedule:
        """How the reference moves."""
        if self.ref_update == "soft":
            return Soft(self.ref_update_alpha, self.ref_update_every)
        if self.ref_update == "hard":
            return Hard(self.ref_update_every)
        return Fixed()

    @property
    def eval_every(self) -> float:
        """Steps between evaluations, or their share of all steps."""
        return self.eval_steps or self.logging_steps

    @property
    def evaluates(self) -> bool:
        return self.eval_strategy != "no" or self.eval_on_start

    @property
    def best_metric(self) -> str:
        """Key of metrics.jsonl that says which checkpoint is best."""
        return "eval_" + (self.metric_for_best_model or "loss").removeprefix("eval_")

    @property
    def more_is_better(self) -> bool:
        if self.greater_is_better is None:
            return not self.best_metric.endswith("loss")
        return self.greater_is_better

    def objective(self, loss: Loss) -> Objective:
        return Objective(loss, average_over=self.group_size)

    def data(self, loss: Loss, name: str | None = None, split: str = "train") -> DataConfig:
        """How to read and encode, for a loss, a split of a data set or rows that are here."""
        return DataConfig(
            name=name or "the rows",
            config=self.dataset_config,
            split=split,
            dataset_format=self.dataset_format,
            columns=self.columns or {},
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            max_completion_length=self.max_completion_length,
            keeps_end=self.truncation_mode == "keep_end",
            weight_column=self.weight_column,
            # Both sides of a pair are kept, unless the loss reads the chosen one alone.
            sides=1 if loss.completions == 1 and not loss.unpaired else 2,
            takes_pairs_apart=loss.unpaired,
            drops_identical=self.drop_identical_sides,
            max_dropped_fraction=self.max_dropped_fraction,
            max_boundary_mismatch=self.max_boundary_mismatch,
            num_proc=self.dataset_num_proc,
        )

    def model(self, device: torch.device, name: str | None = None) -> ModelConfig:
        """How to load the policy; or a model `name` that is compared with it."""
        return ModelConfig(
            name=name or self.model_name_or_path or "",
            revision="main" if name else self.model_revision,
            device=device,
            bf16=self.computes_in_bf16(device),
            attn_implementation=self.attn_implementation,
            gradient_checkpointing=self.gradient_checkpointing is not False and name is None,
            offloads=self.activation_offloading,
            use_liger_kernel=self._patches_layers(device),
            max_length=self.max_length,
            ld_alpha=self.ld_alpha,
            adapter=self.adapter() if name is None else None,
            quantisation=self.quantisation() if name is None else None,
            compile=self.compile,
            tier=SHARED if self.attention_tier == AUTO else self.attention_tier,
            trust_remote_code=self.trust_remote_code,
            router_aux_loss_coef=(self.router_aux_loss_coef or 0.0) if name is None else 0.0,
            chat_template=self.chat_template,
            eos_token=self.eos_token,
        )

    def quantisation(self) -> Quantisation | None:
        """How the frozen matrices under an adapter are held, if not as they are."""
        if not self.load_in_4bit:
            return None
        return Quantisation(self.bnb_4bit_quant_type, self.use_bnb_nested_quant)

    def adapter(self) -> AdapterConfig | None:
        """What is trained of the policy in place of its own weights, if anything."""
        if not self.use_peft:
            return None
        return AdapterConfig(
            r=self.lora_r,
            alpha=self.lora_alpha,
            target_modules=self.lora_target_modules,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            seed=self.seed,
        )

    def ref_rank_bound(self) -> RankBound | None:
        """Of the average of adapters that a soft reference is."""
        if not self.use_peft:
            return None
        return RankBound(self.ref_lora_rank or 6 * self.lora_r, self.ref_lora_tolerance)

    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig(
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(self.adam_beta1, self.adam_beta2),
            eps=self.adam_epsilon,
            name=self.optim,
            arguments=self.optim_args,
            schedule=self.lr_scheduler_type,
            schedule_kwargs=self.lr_scheduler_kwargs,
            warmup_steps=self.warmup_steps,
            moments=self.adam_moments or "fp32",
            keeps_masters=self.dtype != "bfloat16",
            seed=self.seed,
        )

    def sharding(self) -> Sharding:
        """How the weights are divided: as the settings say, else as accelerate does."""
        found = of_environment(os.environ)
        if self.shard_size is not None:
            return Sharding(self.shard_size, self.reshard_after_forward)
        return found._replace(
            reshard_after_forward=found.reshard_after_forward and self.reshard_after_forward
        )

    def layout(self, device: torch.device) -> Layout:
        """How the rows of divided weights are kept."""
        bf16 = self.computes_in_bf16(device)
        is_adapted = self.use_peft
        return Layout(
            halves=bf16 if is_adapted else self.optimizer().splits(bf16),
            keeps_remainders=not is_adapted and self.dtype != "bfloat16",
            reshards=self.sharding().reshard_after_forward,
        )

    def plan(self, trees: TreeSource, loss: Loss, device: torch.device) -> Plan:
        plan = Plan(
            trees,
            train_batch_size=self.train_batch_size,
            max_tokens_per_batch=self.token_budget(device),
            num_train_epochs=self.num_train_epochs,
            max_steps=self.max_steps,
            seed=self.seed if self.data_seed is None else self.data_seed,
            shuffle=self.train_sampling_strategy == "random",
            group_rows=self.group_rows(loss),
            micro_batch_size=self.micro_batch_size,
            multiple_of=self._full_batch if self.dataloader_drop_last else 1,
            separate_groups=bool(self.router_aux_loss_coef),
            tier=SHARED if self.attention_tier == AUTO else self.attention_tier,
            # The router's loss is of all tokens of a micro-batch.
            cuts=self.max_tokens_per_batch is not None and not self.router_aux_loss_coef,
        )
        if plan.rows_per_epoch == 0:
            raise FasttrError(
                f"dataloader_drop_last: {len(trees)} rows do not fill one batch of "
                f"{plan.multiple_of}; leave it out"
            )
        return plan

    def trackers(self) -> TrackerConfig:
        return TrackerConfig(self.report_to, self.run_name, self.project)

    def compiles(self, device: torch.device) -> bool:
        """Whether layers are compiled, where each of them has a whole graph."""
        is_shared = self.attention_tier in (AUTO, SHARED)
        can = is_shared and not self.router_aux_loss_coef and not self.load_in_4bit
        return can and (device.type == "cuda" if self.compile is None else self.compile)

    def _patches_layers(self, device: torch.device) -> bool | None:
        """Whether Liger's kernels are put into layers: where a compiler fuses the same operations
        they are in its way, unless they are asked for."""
        if self.use_liger_kernel is None and self.compiles(device):
            return False
        return self.use_liger_kernel

    def computes_in_bf16(self, device: torch.device) -> bool:
        if self.bf16 is not None:
            return self.bf16
        return device.type == "cuda" or self.dtype == "bfloat16"

    def token_budget(self, device: torch.device) -> int:
        return self.max_tokens_per_batch or (8192 if device.type == "cuda" else 1024)

    def as_planned_in(self, saved: dict[str, Any]) -> Self:
        """The configuration with what a checkpoint's memory plan chose where it says nothing: the
        run goes on as it began, on whatever device."""
        saved = {**BEFORE_PLANS, **saved}
        unsaid = [name for name in PLANNED if getattr(self, name) is None]
        planned: dict[str, Any] = {name: saved.get(name) for name in unsaid}
        return dataclasses.replace(self, **planned)

    def group_rows(self, loss: Loss) -> int:
        """Rows that must share a pack: the group of a loss that couples rows, a micro-batch whose
        router has a loss, else one."""
        if loss.coupled:
            return self._full_batch
        return (self.micro_batch_size or self.train_batch_size) if self.router_aux_loss_coef else 1

    @property
    def _full_batch(self) -> int:
        return self.group_size or self.train_batch_size

    @property
    def output_folder(self) -> Path:
        return Path(self.output_dir)

    @classmethod
    def bound_on_resume(cls) -> list[str]:
        """Settings that a resumed run must have as it began: they touch what is computed."""
        return [name for name, one in settings_of(cls).items() if not one.may_change]

    def as_dict(self) -> dict[str, Any]:
        """All settings as they are written to files: without the access token."""
        return {**dataclasses.asdict(self), "hub_token": None}

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """What binds a resumed run and differs from the configuration it was saved with."""
        now = self.as_dict()
        # A setting that is younger than the checkpoint had what is its default now.
        defaults = {name: one.default for name, one in settings_of(type(self)).items()}
        saved = {**defaults, **BEFORE_PLANS, **saved}
        bound = self.bound_on_resume()
        if self.evaluates and self.eval_steps is None:
            bound.append("logging_steps")  # it says when to evaluate
        return [
            f"{name}: {saved.get(name)!r} -> {now[name]!r}"
            for name in bound
            if saved.get(name) != now[name]
        ]


TrainConfig.__doc__ = described(TrainConfig)
