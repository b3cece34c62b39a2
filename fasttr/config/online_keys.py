"""TRL's keys of GRPOConfig and RLOOConfig, and of its former PPOConfig, that are no setting here:
what becomes of each.

A value equal to TRL's default is accepted silently. Keys that all of TRL's trainers share are in
`fasttr.config.trl_table`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fasttr.errors import FasttrError

_VLLM = "completions are drawn by transformers; leave it out"
_TRUNCATES = (
    "a truncated sampler draws from another policy than the one whose log-probs are trained on; "
    "leave it out"
)
_TOOLS = "tools are not called; leave it out"
_ENTROPY = "the fused loss gives no gradient of the entropy; leave it out"
_LATER = "only the losses that REFERENCE names are built; leave it out"
_SHOWS = "completions are not shown; write a callback for that"
_SIZES = "follows from the other sizes; leave it out"
_OLDER = "a name of an older trainer: set "
_MEMORY = "concerns how transformers keeps its cache, same values"


class OnlineKey(NamedTuple):
    """One key of TRL."""

    default: Any
    is_refused: bool
    note: str


def _refused(default: Any, note: str) -> OnlineKey:
    return OnlineKey(default, True, note)


def _ignored(default: Any, note: str) -> OnlineKey:
    return OnlineKey(default, False, note)


KEYS: dict[str, OnlineKey] = {
    "use_vllm": _refused(False, _VLLM),
    **{
        name: _ignored(default, "read only with use_vllm")
        for name, default in {
            "vllm_mode": "colocate",
            "vllm_model_impl": "vllm",
            "vllm_enable_sleep_mode": False,
            "vllm_structured_outputs_regex": None,
            "vllm_server_base_url": None,
            "vllm_server_host": "0.0.0.0",
            "vllm_server_port": 8000,
            "vllm_server_timeout": 240.0,
            "vllm_group_port": 51216,
            "vllm_gpu_memory_utilization": 0.3,
            "vllm_max_model_length": None,
            "vllm_tensor_parallel_size": 1,
            "vllm_importance_sampling_correction": True,
            "vllm_importance_sampling_mode": "sequence_mask",
            "vllm_importance_sampling_clip_max": 3.0,
            "vllm_importance_sampling_clip_min": None,
            "vllm_importance_sampling_cap": None,
        }.items()
    },
    "top_p": _refused(1.0, _TRUNCATES),
    "top_k": _refused(0, _TRUNCATES),
    "min_p": _refused(None, _TRUNCATES),
    "repetition_penalty": _refused(1.0, _TRUNCATES),
    "generation_kwargs": _refused(None, _TRUNCATES),
    "chat_template_kwargs": _refused(
        None, "templates are rendered without variables; leave it out"
    ),
    "num_generations_eval": _refused(None, "nothing is evaluated; leave it out"),
    "ds3_gather_for_generation": _ignored(True, "there is one process"),
    "cast_lm_head_to_fp32": _ignored(False, "log-probs are fp32 in any case"),
    "cache_implementation": _ignored(None, _MEMORY),
    "use_transformers_continuous_batching": _ignored(False, _MEMORY),
    "use_transformers_paged": _ignored(False, _MEMORY),
    "transformers_continuous_batching_config": _ignored(None, _MEMORY),
    "multi_objective_aggregation": _refused("sum_then_normalize", _LATER),
    "off_policy_mask_threshold": _refused(None, _LATER),
    "top_entropy_quantile": _refused(1.0, _LATER),
    "sapo_temperature_neg": _refused(1.05, _LATER),
    "sapo_temperature_pos": _refused(1.0, _LATER),
    "vespo_k_pos": _refused(2.0, _LATER),
    "vespo_lambda_pos": _refused(3.0, _LATER),
    "vespo_k_neg": _refused(3.0, _LATER),
    "vespo_lambda_neg": _refused(2.0, _LATER),
    "entropy_coef": _refused(0.0, _ENTROPY),
    "use_adaptive_entropy": _refused(False, _ENTROPY),
    "entropy_coef_min": _ignored(0.0, _ENTROPY),
    "entropy_coef_max": _ignored(1.0, _ENTROPY),
    "entropy_coef_delta": _ignored(0.005, _ENTROPY),
    "entropy_target": _ignored(0.2, _ENTROPY),
    "max_tool_calling_iterations": _refused(None, _TOOLS),
    "log_completions": _ignored(False, _SHOWS),
    "log_multimodal": _ignored(True, _SHOWS),
    "num_completions_to_print": _ignored(None, _SHOWS),
    "log_unique_prompts": _ignored(False, _SHOWS),
    "log_completions_hub_repo": _ignored(None, _SHOWS),
}
# Of TRL's former PPOConfig (TRL 1.16 has no PPO): names here.
PPO_NAMES = {
    "num_ppo_epochs": "num_iterations",
    "num_mini_batches": "steps_per_generation",
    "kl_coef": "beta",
    "cliprange": "epsilon",
    "response_length": "max_completion_length",
    "reward_model_path": "reward_model_name_or_path",
    "sft_model_path": "model_name_or_path",
}
EPISODES = "total_episodes"
PPO_KEYS: dict[str, OnlineKey] = {
    "stop_token": _ignored("eos", "a completion ends at the tokenizer's EOS"),
    "stop_token_id": _refused(None, "a completion ends at the tokenizer's EOS; leave it out"),
    "local_rollout_forward_batch_size": _ignored(64, "packs are filled by max_tokens_per_batch"),
    "num_sample_generations": _ignored(10, _SHOWS),
    "exp_name": _ignored("ppo_config", "names nothing here"),
    "model_adapter_name": _refused(None, "one adapter is trained, without a name; leave it out"),
    "ref_adapter_name": _refused(None, "one adapter is trained, without a name; leave it out"),
    **{
        name: _refused(None, _SIZES)
        for name in (
            "world_size",
            "num_total_batches",
            "micro_batch_size",
            "local_batch_size",
            "batch_size",
            "local_mini_batch_size",
            "mini_batch_size",
        )
    },
    "ppo_epochs": _refused(None, _OLDER + "num_iterations"),
    "adap_kl_ctrl": _refused(False, _OLDER + "kl_target"),
    "init_kl_coef": _refused(None, _OLDER + "beta, and kl_target where it should adapt"),
    "target": _refused(None, _OLDER + "kl_target"),
    "horizon": _refused(None, _OLDER + "kl_horizon"),
}
# Defaults of these two trainers where other trainers of TRL have another one.
OWN_DEFAULTS = {"remove_unused_columns": False, "disable_dropout": False}


def take_out(values: dict[str, Any], more: Mapping[str, OnlineKey] | None = None) -> list[str]:
    """Remove TRL's own keys from `values`, those of `more` too; lines for those that are ignored.

    FasttrError names one that is refused.
    """
    notices = []
    keys = {**KEYS, **(more or {})}
    for name in [name for name in values if name in keys]:
        key, value = keys[name], values.pop(name)
        if _is_default(value, key.default):
            continue
        if key.is_refused:
            raise FasttrError(f"{name}: got {value!r}; {key.note}")
        notices.append(f"{name}: ignored: {key.note}")
    for name, default in OWN_DEFAULTS.items():
        if name in values and _is_default(values[name], default):
            del values[name]
    return notices


def generation_steps(values: dict[str, Any]) -> None:
    """`steps_per_generation` in optimizer steps, from TRL's measures: micro-batches, or the
    completions of a rollout in `generation_batch_size`."""
    times = _whole(values, "gradient_accumulation_steps", 1)
    size = values.pop("generation_batch_size", None)
    steps = values.get("steps_per_generation")
    names_trls = "per_device_train_batch_size" in values or "gradient_accumulation_steps" in values
    if size is not None and steps is not None:
        raise FasttrError(
            "generation_batch_size: got it beside steps_per_generation; leave one of them out"
        )
    if size is not None:
        values["steps_per_generation"] = _divided(int(size), _rows(values), "generation_batch_size")
    elif steps is not None and names_trls:
        values["steps_per_generation"] = _divided(int(steps), times, "steps_per_generation")


def rename_ppo(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Names of TRL's former PPOConfig become ours, and its number of completions `max_steps`."""
    for theirs, ours in PPO_NAMES.items():
        if theirs not in values:
            continue
        value = values.pop(theirs)
        if ours in values and values[ours] != value:
            raise FasttrError(
                f"{theirs}: got {value!r} beside {ours} {values[ours]!r}; leave one of them out"
            )
        values[ours] = value
    episodes = values.pop(EPISODES, None)
    if episodes is None:
        return
    passes = _whole({**defaults, **values}, "num_iterations", 1)
    steps = _whole(values, "steps_per_generation", 1)
    rollouts = math.ceil(_whole({EPISODES: episodes}, EPISODES, 0) / (_rows(values) * steps))
    values["max_steps"] = rollouts * steps * passes


def _rows(values: Mapping[str, Any]) -> int:
    """Completions of an optimizer step."""
    if "per_device_train_batch_size" in values or "gradient_accumulation_steps" in values:
        rows = _whole(values, "per_device_train_batch_size", 8)
        return rows * _whole(values, "gradient_accumulation_steps", 1)
    return _whole(values, "train_batch_size", 8)


def _divided(value: int, by: int, name: str) -> int:
    if value % by:
        raise FasttrError(
            f"{name}: got {value}; wanted a multiple of {by}, so that a rollout feeds whole "
            "optimizer steps"
        )
    return value // by


def _whole(values: Mapping[str, Any], name: str, default: int) -> int:
    try:
        return int(values.get(name, default))
    except (TypeError, ValueError) as error:
        raise FasttrError(f"{name}: got {values[name]!r}; wanted a whole number") from error


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, str):  # a word of a command line
        return value.lower() == str(default).lower()
    return value == default
