"""Keys of transformers' TrainingArguments, which TRL's configurations take over, with TRL's
defaults: data alone, a part of `fasttr.config.trl_table`."""

from __future__ import annotations

from fasttr.config.trl_key import honoured as _h
from fasttr.config.trl_key import ignored as _i
from fasttr.config.trl_key import refused as _r
from fasttr.config.trl_key import renamed as _n

SHARDS = "sharding by FSDP2, whatever the file names: see shard_size"
_TRACKIO = "fasttr hands it to nobody; set TRACKIO_SPACE_ID in the environment, or leave it out"
_HUB = "read only with push_to_hub"
_LOADER = "no data loader: rows are read once and planned ahead"
_EVAL = "no logits are kept, only sums"
_LOG = "concerns transformers' own log lines"
DDP = "gradients are summed once a step, over gloo on a CPU and NCCL on GPUs"
_CLASS = "fasttr builds its own batches from the columns it knows"

TRAINING = [
    _h("output_dir", None, "str?", "trainer_output when absent"),
    _n(
        "per_device_train_batch_size",
        8,
        "int",
        "train_batch_size, group_size",
        "train_batch_size is it times gradient_accumulation_steps; group_size is it",
    ),
    _n(
        "gradient_accumulation_steps",
        1,
        "int",
        "train_batch_size",
        "times per_device_train_batch_size",
    ),
    _n(
        "per_device_eval_batch_size",
        8,
        "int",
        "eval_group_size",
        "rows that a loss sees together in an evaluation; packing decides what shares a pass",
    ),
    _h("num_train_epochs", 3.0, "float"),
    _h("max_steps", -1, "int"),
    _h("learning_rate", 1e-6, "float"),
    _h("lr_scheduler_type", "linear", "str", "without greedy"),
    _h("lr_scheduler_kwargs", None, "dict?"),
    _h("warmup_steps", 0, "float", "below 1 a share of all steps"),
    _h("optim", "adamw_torch_fused", "str", "AdamW is always torch's fused one"),
    _h("optim_args", None, "str?"),
    _r("optim_target_modules", None, "any", "every parameter is trained"),
    _h("weight_decay", 0.0, "float"),
    _h("adam_beta1", 0.9, "float"),
    _h("adam_beta2", 0.999, "float"),
    _h("adam_epsilon", 1e-8, "float"),
    _h("max_grad_norm", 1.0, "float", "0 clips nothing"),
    _i(
        "average_tokens_across_devices",
        True,
        "bool",
        "it concerns losses that are normalised by tokens",
    ),
    _i(
        "label_smoothing_factor",
        0.0,
        "float",
        "TRL ignores it too; label_smoothing is the key of the losses",
    ),
    _h("bf16", None, "bool?", "absent: true on CUDA, false on a CPU"),
    _r("fp16", False, "bool", "use bf16"),
    _r("bf16_full_eval", False, "bool", "use bf16"),
    _r("fp16_full_eval", False, "bool", "use bf16"),
    _h("tf32", None, "bool?"),
    _n(
        "activation_checkpointing",
        None,
        "bool?",
        "gradient_checkpointing",
        "wins over the older name",
    ),
    _i("activation_checkpointing_kwargs", None, "any", "values do not depend on it"),
    _h("gradient_checkpointing", True, "bool"),
    _i("gradient_checkpointing_kwargs", None, "any", "values do not depend on it"),
    _n("torch_compile", False, "bool", "compile", "false leaves the choice to compile"),
    _r("torch_compile_backend", None, "str?", "layers are compiled with inductor: leave it out"),
    _r("torch_compile_mode", None, "str?", "layers are compiled in the default mode: leave it out"),
    _h(
        "use_liger_kernel",
        False,
        "bool",
        "Liger's layers, not its losses; absent: where CUDA and liger-kernel are, not compiled",
    ),
    _i("liger_kernel_config", None, "any", "values do not depend on which of Liger's kernels run"),
    _i("use_cache", False, "bool", "training reads no key-value cache"),
    _r(
        "neftune_noise_alpha",
        None,
        "float?",
        "it is not built; with it the loss at step 0 is not log 2",
    ),
    _i("torch_empty_cache_steps", None, "int?", "it concerns memory only"),
    _i(
        "auto_find_batch_size",
        False,
        "bool",
        "memory follows max_tokens_per_batch, not the batch size",
    ),
    _h("logging_strategy", "steps", "strategy"),
    _h("logging_steps", 10, "float", "below 1 a share of all steps"),
    _h("logging_first_step", False, "bool"),
    _i("log_on_each_node", True, "bool", _LOG),
    _i(
        "logging_nan_inf_filter",
        True,
        "bool",
        "a loss that is not finite is never hidden: it stops the run",
    ),
    _i("include_num_input_tokens_seen", "no", "any", "num_tokens is always logged"),
    _i("log_level", "passive", "str", _LOG),
    _i("log_level_replica", "warning", "str", _LOG),
    _h("disable_tqdm", None, "bool?"),
    _h("report_to", "none", "names", "none, tensorboard, wandb, trackio"),
    _h("run_name", None, "str?"),
    _h("project", "huggingface", "str"),
    _r("trackio_space_id", None, "str?", _TRACKIO),
    _r("trackio_bucket_id", None, "str?", _TRACKIO),
    _r("trackio_static_space_id", None, "any", _TRACKIO),
    _h("eval_strategy", "no", "strategy"),
    _h("eval_steps", None, "float?", "below 1 a share of all steps; absent: logging_steps"),
    _h("eval_delay", 0, "float"),
    _h("eval_on_start", False, "bool"),
    _i("prediction_loss_only", False, "bool", _EVAL),
    _i("eval_do_concat_batches", True, "bool", _EVAL),
    _i("eval_use_gather_object", False, "bool", _EVAL),
    _i("eval_accumulation_steps", None, "int?", _EVAL),
    _i("include_for_metrics", [], "names", _EVAL),
    _i("batch_eval_metrics", False, "bool", _EVAL),
    _h("save_strategy", "steps", "strategy"),
    _h("save_steps", 500, "float", "below 1 a share of all steps"),
    _h("save_total_limit", None, "int?"),
    _h("save_only_model", False, "bool"),
    _i("save_on_each_node", False, "bool", DDP),
    _i("enable_jit_checkpoint", False, "bool", "a signal always saves before it stops the run"),
    _h("push_to_hub", False, "bool"),
    *(
        _h(name, default, type_, _HUB)
        for name, default, type_ in (
            ("hub_token", None, "str?"),
            ("hub_private_repo", None, "bool?"),
            ("hub_model_id", None, "str?"),
            ("hub_strategy", "every_save", "str"),
            ("hub_always_push", False, "bool"),
            ("hub_revision", None, "str?"),
        )
    ),
    _h("load_best_model_at_end", False, "bool", "refused with a moving reference"),
    _h("metric_for_best_model", None, "str?", "eval_loss when absent"),
    _h("greater_is_better", None, "bool?", "absent: not for a metric that ends in loss"),
    _r("ignore_data_skip", False, "bool", "a resumed run goes on at its row exactly; leave it out"),
    _i(
        "restore_callback_states_from_checkpoint",
        False,
        "bool",
        "there are no callbacks to restore",
    ),
    _h("full_determinism", False, "bool"),
    _h("seed", 42, "int"),
    _h("data_seed", None, "int?"),
    _h("use_cpu", False, "bool"),
    _r(
        "accelerator_config",
        None,
        "any",
        "accelerate is not used; only its defaults are accepted, leave it out",
    ),
    _r("parallelism_config", None, "any", "FSDP2 under shard_size; leave it out"),
    _h("dataloader_drop_last", False, "bool"),
    *(
        _i(name, default, type_, _LOADER)
        for name, default, type_ in (
            ("dataloader_num_workers", 0, "int"),
            ("dataloader_pin_memory", True, "bool"),
            ("dataloader_persistent_workers", False, "bool"),
            ("dataloader_prefetch_factor", None, "int?"),
            ("dataloader_multiprocessing_context", None, "str?"),
            ("dataloader_in_order", True, "bool"),
        )
    ),
    _i("remove_unused_columns", True, "bool", _CLASS),
    _i("label_names", None, "names?", _CLASS),
    _i("length_column_name", "length", "str", _CLASS),
    _h("train_sampling_strategy", "random", "str", "random or sequential; fasttr kto: sequential"),
    *(
        _i(name, default, type_, DDP)
        for name, default, type_ in (
            ("ddp_find_unused_parameters", None, "bool?"),
            ("ddp_bucket_cap_mb", None, "int?"),
            ("ddp_broadcast_buffers", None, "bool?"),
            ("ddp_static_graph", None, "bool?"),
            ("ddp_backend", None, "str?"),
            ("local_rank", -1, "int"),
        )
    ),
    _h("ddp_timeout", 1800, "int"),
    _n("fsdp", None, "any", "shard_size", f"{SHARDS}; offload is refused"),
    _n(
        "fsdp_config",
        None,
        "any",
        "reshard_after_forward",
        "read only with fsdp; offload is refused",
    ),
    _n("deepspeed", None, "any", "shard_size", f"{SHARDS}; its ZeRO stage; offload is refused"),
    _i("debug", "", "any", "it concerns transformers' trainer"),
    _i("skip_memory_metrics", True, "bool", "memory/peak_gib is always logged"),
    _i("do_train", False, "bool", "fasttr train trains"),
    _i("do_eval", False, "bool", "eval_strategy decides"),
    _i("do_predict", False, "bool", "fasttr train trains"),
    _h("resume_from_checkpoint", None, "any", "a folder that fasttr saved, or true for the newest"),
]
