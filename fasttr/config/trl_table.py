"""Every key that a TRL user may bring, with TRL's default and what becomes of it: data alone, read
by `fasttr.config.trl`.

TRL is not a dependency; a test compares names and defaults with the installed one.
"""

from __future__ import annotations

from typing import Any

from fasttr.config.transformers_table import DDP, SHARDS, TRAINING
from fasttr.config.trl_key import Key
from fasttr.config.trl_key import honoured as _h
from fasttr.config.trl_key import ignored as _i
from fasttr.config.trl_key import refused as _r
from fasttr.config.trl_key import renamed as _n
from fasttr.config.trl_key import same as _same

_LORA = "read only with use_peft"
_QUANTIZED = "8 bits are not built; load_in_4bit with use_peft holds the frozen matrices in 4"
_PACKING = "read only with packing"
_OLD = "transformers no longer has it, and it changes no values"
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
    _i("ignore_bias_buffers", False, "bool", DDP),
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
    _n("use_fsdp", False, "bool", "shard_size", SHARDS),
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
