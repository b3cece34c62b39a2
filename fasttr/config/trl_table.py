"""Every key that a TRL user may bring, with TRL's default and what becomes of it: data alone, read
by `trl_keys`.

TRL is not a dependency; a test compares names and defaults with the installed one.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Kind = Literal["honoured", "renamed", "ignored", "refused"]


class Key(NamedTuple):
    """One key. A value equal to `default` is accepted silently, whatever the kind."""

    name: str
    default: Any
    # int, float, bool, str, names, floats, dict, strategy, any; with ? where none is a value
    type: str
    kind: Kind
    note: str = ""  # honoured: what is special; renamed: how; ignored: why; refused: advice
    ours: str = ""  # the key it is renamed to
    plainly: bool = False  # renamed, with the same values


def _h(name: str, default: Any, type_: str, note: str = "") -> Key:
    return Key(name, default, type_, "honoured", note)


def _n(name: str, default: Any, type_: str, ours: str, note: str = "") -> Key:
    return Key(name, default, type_, "renamed", note, ours)


def _same(name: str, default: Any, type_: str, ours: str, note: str = "") -> Key:
    return Key(name, default, type_, "renamed", note, ours, plainly=True)


def _i(name: str, default: Any, type_: str, reason: str) -> Key:
    return Key(name, default, type_, "ignored", reason)


def _r(name: str, default: Any, type_: str, advice: str) -> Key:
    return Key(name, default, type_, "refused", advice)


_SHARDS = "sharding by FSDP2, whatever the file names: see shard_size"
_TRACKIO = "fasttr hands it to nobody; set TRACKIO_SPACE_ID in the environment, or leave it out"
_HUB = "read only with push_to_hub"
_LORA = "read only with use_peft"
_QUANTIZED = "8 bits are not built; load_in_4bit with use_peft holds the frozen matrices in 4"
_PACKING = "read only with packing"
_OLD = "transformers no longer has it, and it changes no values"
_LOADER = "no data loader: rows are read once and planned ahead"
_EVAL = "no logits are kept, only sums"
_LOG = "concerns transformers' own log lines"
_DDP = "gradients are summed once a step, over gloo on a CPU and NCCL on GPUs"
_CLASS = "fasttr builds its own batches from the columns it knows"
_LAUNCH = "processes of one machine are started here; for several use torchrun on each"

# DPOConfig and KTOConfig: what is computed.
METHOD = [
    _h(
        "loss_type",
        ["sigmoid"],
        "names",
        "absent: that of the command, or of the rows: sigmoid for pairs, kto for unpaired ones",
    ),
    _h("loss_weights", None, "floats?"),
    _h("beta", 0.1, "float"),
    _h("label_smoothing", 0.0, "float"),
    _h("f_divergence_type", "reverse_kl", "str"),
    _h("f_alpha_divergence_coef", 0.5, "float"),
    _h("ld_alpha", None, "float?"),
    _h("use_weighting", False, "bool", "refused with sft, on which TRL stops"),
    _h("discopop_tau", 0.05, "float"),
    _h("desirable_weight", 1.0, "float"),
    _h("undesirable_weight", 1.0, "float"),
    _n(
        "sync_ref_model",
        False,
        "bool",
        "ref_update",
        "true: soft, or hard when ref_model_mixup_alpha is 1",
    ),
    _n(
        "ref_model_mixup_alpha",
        0.6,
        "float",
        "ref_update_alpha",
        "read only when the reference moves",
    ),
    _n(
        "ref_model_sync_steps", 512, "int", "ref_update_every", "read only when the reference moves"
    ),
    _i("precompute_ref_log_probs", False, "bool", "the reference is always scored ahead"),
    _i("precompute_ref_batch_size", None, "int?", "packing decides; values do not depend on it"),
    _h("max_length", 1024, "int?"),
    _h(
        "truncation_mode",
        "keep_start",
        "str",
        "keep_end: sides of unequal length share no prompt; refused for unpaired rows",
    ),
    _i("padding_free", False, "bool", "always packed without padding, same values"),
    _i("pad_to_multiple_of", "auto", "any", "there is no padding"),
    _h("disable_dropout", True, "bool", "false: only for a model without dropout"),
    _h("activation_offloading", False, "bool", "with gradient_checkpointing alone"),
    _h("router_aux_loss_coef", None, "float?"),
    _n(
        "model_init_kwargs",
        None,
        "dict?",
        "dtype, attn_implementation, model_revision",
        "those three entries are read and win; those that concern speed are ignored, others "
        "refused",
    ),
    _h("trust_remote_code", False, "bool"),
    _h("dataset_num_proc", None, "int?"),
    _i("pad_token", None, "str?", "no padding token reaches the model"),
]

# SFTConfig alone.
SFT = [
    _same("chat_template_path", None, "str?", "chat_template", "a .jinja file; nothing else"),
    _r(
        "dataset_text_field",
        "text",
        "str",
        "rows of whole text are not trained on; give prompt and completion, or messages",
    ),
    _r("dataset_kwargs", None, "any", "rows are always prepared; leave it out"),
    _h("eos_token", None, "str?"),
    _r("shuffle_dataset", False, "bool", "every epoch has an order of its own; leave it out"),
    _r(
        "packing",
        False,
        "bool",
        "rows are packed without padding and still see themselves alone; a batch counts rows, not "
        "blocks of max_length: leave it out",
    ),
    _i("packing_strategy", "bfd", "str", _PACKING),
    _i("eval_packing", None, "bool?", _PACKING),
    _i(
        "completion_only_loss",
        None,
        "bool?",
        "of a prompt and its completion the completion is trained on, of messages all; false with "
        "a prompt is refused",
    ),
    _r(
        "assistant_only_loss",
        False,
        "bool",
        "turns of a conversation are not masked; give its last one as completion",
    ),
]

# TrainingArguments, through DPOConfig and KTOConfig.
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
    _i("save_on_each_node", False, "bool", _DDP),
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
        _i(name, default, type_, _DDP)
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
    _n("fsdp", None, "any", "shard_size", f"{_SHARDS}; offload is refused"),
    _n(
        "fsdp_config",
        None,
        "any",
        "reshard_after_forward",
        "read only with fsdp; offload is refused",
    ),
    _n("deepspeed", None, "any", "shard_size", f"{_SHARDS}; its ZeRO stage; offload is refused"),
    _i("debug", "", "any", "it concerns transformers' trainer"),
    _i("skip_memory_metrics", True, "bool", "memory/peak_gib is always logged"),
    _i("do_train", False, "bool", "fasttr train trains"),
    _i("do_eval", False, "bool", "eval_strategy decides"),
    _i("do_predict", False, "bool", "fasttr train trains"),
    _h("resume_from_checkpoint", None, "any", "a folder that fasttr saved, or true for the newest"),
]

MODEL = [
    _h("model_name_or_path", None, "str?"),
    _h("model_revision", "main", "str"),
    _h("dtype", "float32", "str", "bfloat16 as in the table of settings; auto is float32"),
    _h(
        "attn_implementation",
        None,
        "str?",
        "none, sdpa, eager, flash_attention_2; flash_attention_3 and kernels from the hub become "
        "our own, same values",
    ),
    _h("use_peft", False, "bool", "LoRA through peft; the fixed reference is the base"),
    _h("lora_r", 16, "int", _LORA),
    _h("lora_alpha", 32, "int", _LORA),
    _i(
        "lora_dropout",
        0.05,
        "float",
        "dropout is off, as in TRL while disable_dropout is true",
    ),
    _h("lora_target_modules", None, "names?", _LORA),
    _h("lora_target_parameters", None, "names?", _LORA),
    _h("lora_modules_to_save", None, "names?", _LORA),
    _r("lora_task_type", "CAUSAL_LM", "str", "causal language models alone; leave it out"),
    _h("use_rslora", False, "bool", _LORA),
    _h("use_dora", False, "bool", f"{_LORA}; refused with a soft reference"),
    _r("load_in_8bit", False, "bool", _QUANTIZED),
    _h("load_in_4bit", False, "bool", f"{_LORA}; needs bitsandbytes"),
    _h("bnb_4bit_quant_type", "nf4", "str", "read only with load_in_4bit"),
    _h("use_bnb_nested_quant", False, "bool", "read only with load_in_4bit"),
    _i("bnb_4bit_quant_storage", None, "str?", "read only with load_in_4bit"),
]

# ScriptArguments, DatasetMixtureConfig, and what the parser itself reads.
DATA = [
    _h("dataset_name", None, "str?", "a hub id, or a folder or file"),
    _h("dataset_config", None, "str?"),
    _h("dataset_train_split", "train", "str"),
    _h("dataset_test_split", "test", "str"),
    _same("dataset_streaming", False, "bool", "streaming"),
    _i("ignore_bias_buffers", False, "bool", _DDP),
    _h(
        "datasets",
        [],
        "any",
        "each with path, name, data_dir, data_files, split, columns, fraction",
    ),
    _h("streaming", False, "bool", "needs max_steps"),
    _h("test_split_size", None, "float?", "seeded by seed"),
    _h("env", None, "dict?", "set before anything is imported; in a file only"),
]

# What `trl` hands on to `accelerate launch`, with the defaults of one process.
LAUNCH = [
    _h("num_processes", None, "int?", "started by fasttr, unless a launcher has done so"),
    _r("num_machines", 1, "int", "start torchrun on every machine"),
    _i("machine_rank", 0, "int", _LAUNCH),
    _i("main_process_ip", None, "str?", _LAUNCH),
    _i("main_process_port", None, "any", _LAUNCH),
    _r("gpu_ids", "all", "str", "set CUDA_VISIBLE_DEVICES to one GPU"),
    _n("mixed_precision", "no", "str", "bf16", "bf16: true; fp16 and fp8 are refused"),
    _i("multi_gpu", False, "bool", "num_processes says how many there are"),
    _n("use_fsdp", False, "bool", "shard_size", _SHARDS),
    _r("use_deepspeed", False, "bool", "write shard_size: 0, or accelerate_config: zero3"),
    _n(
        "accelerate_config",
        "single_gpu",
        "str",
        "shard_size",
        "single_gpu, multi_gpu, fsdp1, fsdp2, zero1 to zero3 (8 processes unless num_processes "
        "says otherwise), or a file of accelerate: its processes, precision and sharding; offload "
        "is refused",
    ),
    _n("config_file", None, "any", "shard_size", "a file of accelerate, as with accelerate_config"),
]

_CUTS = "TRL 1.16 cuts by max_length alone; leave it out"
_ADAPTER = "there is one adapter, and the reference is not named by one; leave it out"

# Keys of older TRL, older transformers and alignment-handbook that TRL 1.16 no longer has, with
# their defaults there.
OLDER = [
    _n(
        "warmup_ratio",
        0.0,
        "float",
        "warmup_steps",
        "a share of all steps; read when warmup_steps is 0 or absent",
    ),
    _same("evaluation_strategy", "no", "strategy", "eval_strategy"),
    _same("torch_dtype", None, "str?", "dtype"),
    _same("no_cuda", False, "bool", "use_cpu"),
    _same("hub_model_revision", "main", "str?", "hub_revision"),
    _same("push_to_hub_model_id", None, "str?", "hub_model_id"),
    _same("push_to_hub_token", None, "str?", "hub_token"),
    _same("preprocessing_num_workers", None, "int?", "dataset_num_proc"),
    _same("max_seq_length", None, "int?", "max_length"),
    _n("use_flash_attention_2", False, "bool", "attn_implementation", "true: flash_attention_2"),
    _h("chat_template", None, "str?"),
    _h("max_prompt_length", None, "int?", "the prompt's last tokens, as TRL 0.12 to 0.28 had it"),
    _h("max_completion_length", None, "int?", "the completion's first tokens, as TRL had it"),
    _h("dataset_mixture", None, "any", "rows and order are alignment-handbook's"),
    _n(
        "dataset_mixer",
        None,
        "any",
        "dataset_mixture",
        "the first rows of each train split, all of each test split, shuffled together",
    ),
    _n("dataset_splits", None, "names?", "dataset_mixture", "read with dataset_mixer"),
    _n("dataset_configs", None, "names?", "dataset_mixture", "read with dataset_mixer"),
    _h(
        "overwrite_output_dir",
        False,
        "bool",
        "deletes the checkpoints in output_dir and starts over",
    ),
    _i("group_by_length", False, "bool", "packing already removes padding"),
    _r("save_safetensors", True, "bool", "weights are always saved as safetensors"),
    _i("logging_dir", None, "str?", "TensorBoard writes into runs/ under output_dir"),
    _i(
        "use_logits_to_keep",
        False,
        "bool",
        "logits of completions alone are always what is computed",
    ),
    _i(
        "auto_insert_empty_system_msg",
        False,
        "bool",
        "no message is put in; the chat template decides",
    ),
    *(
        _i(name, default, type_, _OLD)
        for name, default, type_ in (
            ("half_precision_backend", "auto", "str"),
            ("include_tokens_per_second", False, "bool"),
            ("include_inputs_for_metrics", False, "bool"),
            ("jit_mode_eval", False, "bool"),
            ("use_mps_device", False, "bool"),
            ("past_index", -1, "int"),
        )
    ),
    _r(
        "rpo_alpha",
        None,
        "float?",
        "use loss_type: [sigmoid, sft] with loss_weights; its normalisation differs",
    ),
    _r("reference_free", False, "bool", "use a loss without a reference, such as simpo"),
    _r("generate_during_eval", False, "bool", "generate from the saved model afterwards"),
    _r("force_use_ref_model", False, "bool", "ref_model_name_or_path names another reference"),
    _r(
        "ref_model_init_kwargs", None, "any", "the reference is read as the policy is; leave it out"
    ),
    _r("tokenizer_name_or_path", None, "str?", "the tokenizer is that of model_name_or_path"),
    _r("model_adapter_name", None, "str?", _ADAPTER),
    _r("ref_adapter_name", None, "str?", _ADAPTER),
    _r("label_pad_token_id", -100, "int", "there is no padding; leave it out"),
    _r("padding_value", None, "int?", "there is no padding; leave it out"),
]

SECTIONS = {
    "DPO and KTO": METHOD,
    "SFT": SFT,
    "Training": TRAINING,
    "Model": MODEL,
    "Data": DATA,
    "Launch": LAUNCH,
    "Older TRL, transformers and alignment-handbook": OLDER,
}
TABLE: dict[str, Key] = {key.name: key for section in SECTIONS.values() for key in section}

# Where the default of KTOConfig, or of SFTConfig, is another one.
KTO_DEFAULTS: dict[str, Any] = {"loss_type": "kto", "train_sampling_strategy": "sequential"}
SFT_DEFAULTS: dict[str, Any] = {"loss_type": "nll", "learning_rate": 2e-5}

# Values of accelerator_config that change nothing.
ACCELERATOR: dict[str, Any] = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
    "use_configured_state": False,
}

# Entries of model_init_kwargs that are settings of ours, and those that change no values.
MODEL_ENTRIES = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
}
_SPEED = "it concerns speed or memory alone"
SPEED_ENTRIES = {
    "use_kernels": _SPEED,
    "kernel_config": _SPEED,
    "use_cache": _SPEED,
    "low_cpu_mem_usage": _SPEED,
    "use_flash_attention_2": _SPEED,
    "use_safetensors": "weights are always read from safetensors",
}

# Two names of one thing: a flag of one name replaces a file's key of the other.
RIVALS = [
    {"gradient_checkpointing", "activation_checkpointing"},
    {"warmup_steps", "warmup_ratio"},
    {"ref_update", "sync_ref_model"},
    {"ref_update_alpha", "ref_model_mixup_alpha"},
    {"ref_update_every", "ref_model_sync_steps"},
    {"train_batch_size", "per_device_train_batch_size"},
    {"train_batch_size", "gradient_accumulation_steps"},
    {"dataset_mixture", "dataset_mixer"},
    *({key.name, key.ours} for key in TABLE.values() if key.plainly),
]
