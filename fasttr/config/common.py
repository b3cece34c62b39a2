"""Settings that every kind of run has, a class for each group of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fasttr.data.formats import DATASET_FORMATS
from fasttr.optim.adamw import SCHEDULES
from fasttr.optim.named import OPTIMIZERS
from fasttr.packing.tiers import AUTO, TIERS
from fasttr.settings import (
    ROWS_OR_SHARE,
    SEED,
    Range,
    above,
    at_least,
    between,
    from_to_below,
    one_of,
    setting,
    whole,
)


@dataclass(frozen=True)
class ModelSettings:
    """Model."""

    model_name_or_path: str | None = setting(
        None,
        None,
        "hub id or folder of the policy; its weights are held in float32",
        may_change=True,
        in_eval=True,
    )
    model_revision: str = setting("main", None, "branch, tag or commit of a hub model")
    disable_dropout: bool = setting(
        True,
        None,
        "false is refused for a model with dropout, since dropout is off in policy and reference",
    )
    attn_implementation: str | None = setting(
        None,
        None,
        "attention; none picks what the device has, else sdpa, eager, varlen, flash_attention_2",
        in_eval=True,
    )
    compile: bool | None = setting(
        None,
        None,
        "compile decoder layers with torch.compile; none means on a CUDA device, where they have a "
        "whole graph",
        in_eval=True,
    )
    attention_tier: str = setting(
        AUTO,
        one_of(AUTO, *TIERS),
        "how rows share a call of the model: auto takes the first that a probe finds exact for the "
        "architecture; shared has each prompt once, packed repeats it, padded adds padding",
        in_eval=True,
    )
    router_aux_loss_coef: float | None = setting(
        None,
        at_least(0),
        "factor on the loss that keeps experts of a mixture equally busy; none means the "
        "architecture's own, and each micro-batch is one pack where it is not 0",
    )
    trust_remote_code: bool = setting(
        False, None, "run the code that a model's folder brings", in_eval=True
    )
    resize_embeddings: bool = setting(
        False,
        None,
        "give a model whose tokenizer knows more tokens than its embedding has rows the missing "
        "ones, each the mean of the others",
    )
    use_liger_kernel: bool | None = setting(
        None,
        None,
        "Liger's norm, rotary and MLP kernels; none means where CUDA and liger-kernel are present "
        "and layers are not compiled",
        in_eval=True,
    )
    chat_template: str | None = setting(
        None,
        None,
        "chat template, as text or a .jinja file, instead of the tokenizer's own",
        in_eval=True,
    )
    eos_token: str | None = setting(
        None, None, "end of a completion, instead of the tokenizer's own", in_eval=True
    )
    gradient_checkpointing: bool | None = setting(
        None,
        None,
        "recompute whole layers in the backward pass: less memory, same values; none means as the "
        "memory plan says on CUDA, and true on a CPU",
        may_change=True,
    )
    activation_memory_budget: float | None = setting(
        None,
        between(0, 1),
        "share of its activations that a compiled layer keeps for the backward pass, as torch has "
        "it: down to 0.8 no product is made again; none means as the memory plan says",
        may_change=True,
    )
    activation_offloading: bool = setting(
        False,
        None,
        "keep what gradient_checkpointing leaves of a layer, its input, in host memory until the "
        "backward pass: for sequences so long that nothing else helps; same values",
        may_change=True,
    )


@dataclass(frozen=True)
class DataSettings:
    """Data."""

    dataset_name: str | None = setting(
        None,
        None,
        "hub id, folder or file (json, jsonl, parquet, csv, also gz) of preference rows",
        may_change=True,
        in_eval=True,
    )
    datasets: list[dict[str, Any]] | None = setting(
        None,
        None,
        "a mixture, which wins over dataset_name: a list of path, name, data_dir, data_files, "
        "split, columns, fraction; fraction is for all or none, and nothing is used twice",
        in_eval=True,
    )
    test_split_size: float | None = setting(
        None,
        ROWS_OR_SHARE,
        "rows set aside as the test split, drawn from seed",
        in_eval=True,
    )
    dataset_mixture: dict[str, Any] | None = setting(
        None,
        None,
        "a mixture in alignment-handbook's form: datasets (a list of id, config, split, columns, "
        "weight), seed, test_split_size",
        in_eval=True,
    )
    streaming: bool = setting(
        False,
        None,
        "read only as many rows as max_steps takes, in their order",
        in_eval=True,
    )
    dataset_config: str | None = setting(
        None, None, "configuration of a hub data set", in_eval=True
    )
    dataset_train_split: str = setting("train", None, "split to train on")
    dataset_test_split: str = setting("test", None, "split to evaluate on", in_eval=True)
    dataset_format: str | None = setting(
        None,
        one_of(*DATASET_FORMATS),
        "none reads the columns as TRL does; hh_rlhf splits raw transcripts at the last Assistant "
        "turn",
        in_eval=True,
    )
    columns: dict[str, str] | None = setting(
        None,
        None,
        "names of columns, such as chosen: good, rejected: bad; none takes them as they are",
        in_eval=True,
    )
    dataset_num_proc: int | None = setting(
        None,
        whole(1),
        "processes for tokenising; none means this one. With kto the rows of each are taken apart "
        "and mismatched by themselves, as in TRL",
        may_change=True,
        in_eval=True,
    )
    eval_dataset_name: str | None = setting(
        None,
        None,
        "data set to evaluate on; none means the test split of dataset_name",
        in_eval=True,
    )
    weight_column: str | None = setting(
        None, None, "column of row weights that multiply the loss", in_eval=True
    )
    max_length: int | None = setting(
        1024,
        Range("a whole number from 2, or none", lambda x: 1 < x < 2**31),
        "prompt and completion together, in tokens; none cuts nothing",
        in_eval=True,
    )
    truncation_mode: str = setting(
        "keep_start",
        one_of("keep_start", "keep_end"),
        "end that max_length cuts; with keep_end sides of unequal length share no prompt",
        in_eval=True,
    )
    max_prompt_length: int | None = setting(
        None, whole(1), "last tokens of a prompt that are kept; none keeps all", in_eval=True
    )
    max_completion_length: int | None = setting(
        None, whole(1), "first tokens of a completion that are kept; none keeps all", in_eval=True
    )
    drop_identical_sides: bool = setting(
        True,
        None,
        "leave out pairs whose sides are the same tokens, which teach nothing; TRL keeps them, and "
        "so does fasttr dpo",
        in_eval=True,
    )
    max_dropped_fraction: float = setting(
        1.0,
        between(0, 1),
        "stop when more rows than this are dropped",
        may_change=True,
        in_eval=True,
    )
    max_boundary_mismatch: float | None = setting(
        None,
        between(0, 1),
        "stop when more rows than this merge a token across the prompt's end",
        may_change=True,
    )


@dataclass(frozen=True)
class StepSettings:
    """Steps and batches."""

    train_batch_size: int = setting(8, whole(1), "rows per optimizer step", in_eval=True)
    micro_batch_size: int | None = setting(
        None,
        whole(1),
        "rows whose mean counts as much as that of any other so many, in losses and in metrics of "
        "a step, as in TRL with gradient_accumulation_steps; none means all rows of a step",
    )
    max_tokens_per_batch: int | None = setting(
        None,
        whole(1),
        "tokens per forward pass; memory follows it, results do not. None means as the memory plan "
        "says on CUDA (8192 to evaluate), and 1024 on a CPU, where larger passes are not faster",
        in_eval=True,
    )
    num_train_epochs: float = setting(
        3.0, above(0), "passes over the data, may be a fraction", may_change=True
    )
    max_steps: int = setting(
        -1,
        Range("a whole number from 1, or -1", lambda x: x == -1 or x >= 1),
        "optimizer steps; above 0 it wins over num_train_epochs",
        may_change=True,
    )
    train_sampling_strategy: str = setting(
        "random",
        one_of("random", "sequential"),
        "order of the rows: TRL's permutation, or that of the data",
    )
    dataloader_drop_last: bool = setting(
        False,
        None,
        "leave out an epoch's last rows that do not fill group_size, or a step without one",
    )
    seed: int = setting(42, SEED, "seed of everything random", in_eval=True)
    data_seed: int | None = setting(None, SEED, "seed of the order of rows; none means seed")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer."""

    optim: str = setting(
        "adamw_torch_fused",
        one_of(*OPTIMIZERS),
        "optimizer by transformers' name; every AdamW in full precision is torch's fused one",
    )
    optim_args: str | None = setting(
        None, None, "arguments of an optimizer other than AdamW, such as momentum=0.9,alpha=0.99"
    )
    learning_rate: float = setting(1e-6, at_least(0), "peak rate")
    lr_scheduler_type: str = setting(
        "linear",
        one_of(*SCHEDULES),
        "schedule of the rate; reduce_lr_on_plateau follows metric_for_best_model of evaluations",
    )
    lr_scheduler_kwargs: dict[str, Any] | None = setting(
        None, None, "further arguments of that schedule"
    )
    warmup_steps: float = setting(0, at_least(0), "steps of warm-up; below 1 a share of all steps")
    weight_decay: float = setting(0.0, at_least(0), "decoupled decay; biases and norms have none")
    adam_beta1: float = setting(0.9, from_to_below(0, 1), "decay of AdamW's first moment")
    adam_beta2: float = setting(0.999, from_to_below(0, 1), "decay of AdamW's second moment")
    adam_epsilon: float = setting(1e-8, above(0), "AdamW's epsilon")
    adam_moments: str | None = setting(
        None,
        one_of("fp32", "bf16", "int8"),
        "how AdamW's moments are held: 8, 4 or 2.06 bytes a weight; bf16 is rounded "
        "stochastically, int8 is companded in groups of 128; none means fp32, but where the memory "
        "plan of a GPU has no room for it",
    )
    max_grad_norm: float = setting(
        1.0, at_least(0), "clip the gradient's norm to this; 0 clips nothing"
    )


@dataclass(frozen=True)
class ComputeSettings:
    """Precision and device."""

    bf16: bool | None = setting(
        None,
        None,
        "compute in bfloat16; none means true on CUDA and false on a CPU",
        in_eval=True,
    )
    tf32: bool | None = setting(
        None, None, "TF32 in float32 products on CUDA; none leaves torch's setting"
    )
    dtype: str = setting(
        "float32",
        Range(
            "one of float32, bfloat16, auto (float16 loses small gradients)",
            lambda x: x in ("float32", "bfloat16", "auto"),
        ),
        "what AdamW's steps are made on. float32, also called auto: under bf16 a matrix is "
        "bfloat16 for the model with 16 more bits for the optimizer. bfloat16 leaves those out, "
        "rounds stochastically and implies bf16",
    )
    memory_budget_gib: float | None = setting(
        None,
        above(0),
        "memory of the device to plan with, in GiB; none means 0.95 of a GPU's, and no plan on a "
        "CPU",
        may_change=True,
    )
    full_determinism: bool = setting(False, None, "deterministic CUDA kernels, slower")
    use_cpu: bool = setting(False, None, "train on the CPU even when there is a GPU", in_eval=True)
