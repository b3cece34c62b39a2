"""How other launchers say that weights are to be divided: accelerate's environment, and its files,
which `trl --accelerate_config` names too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fasttr.errors import FasttrError

ALL = 0  # as a shard_size: one copy of the weights among all processes


class Sharding(NamedTuple):
    """In settings of ours."""

    shard_size: int = 1
    reshard_after_forward: bool = True


WHOLE = Sharding()
FULL = Sharding(ALL)
GATHERED_ONCE = Sharding(ALL, reshard_after_forward=False)

# FSDP1's strategies by name and by number; FSDP2 writes true or false in their place.
_STRATEGIES = {
    "FULL_SHARD": FULL,
    "1": FULL,
    "TRUE": FULL,
    "SHARD_GRAD_OP": GATHERED_ONCE,
    "2": GATHERED_ONCE,
    "FALSE": GATHERED_ONCE,
    "NO_SHARD": WHOLE,
    "3": WHOLE,
}
# ZeRO 1 and 2 keep the weights whole in every process: gathered once a pass comes nearest.
_STAGES = {"0": WHOLE, "1": GATHERED_ONCE, "2": GATHERED_ONCE, "3": FULL}
# What `trl --accelerate_config` names.
PLANS = {
    "single_gpu": WHOLE,
    "multi_gpu": WHOLE,
    "fsdp1": FULL,
    "fsdp2": FULL,
    "zero1": GATHERED_ONCE,
    "zero2": GATHERED_ONCE,
    "zero3": FULL,
}


def of_environment(environment: Mapping[str, str]) -> Sharding:
    """What `accelerate launch` put there; `WHOLE` without it. FasttrError for what is not done."""

    def get(name: str, default: str) -> str:
        return environment.get(name, default)

    if get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        offloads = [get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{x}_DEVICE", "none") for x in _OFFLOADED]
        return of_zero(get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"), offloads)
    if get("ACCELERATE_USE_FSDP", "false") != "true":
        return WHOLE
    is_second = get("FSDP_VERSION", "1") == "2"
    strategy = "FSDP_RESHARD_AFTER_FORWARD" if is_second else "FSDP_SHARDING_STRATEGY"
    return of_fsdp(
        get(strategy, get("FSDP_RESHARD_AFTER_FORWARD", "true")),
        offloads=get("FSDP_OFFLOAD_PARAMS", "false") == "true",
        per_machine=int(get("LOCAL_WORLD_SIZE", "0")),
    )


_OFFLOADED = ("OPTIMIZER", "PARAM")


def of_file(content: Mapping[str, object], key: str) -> Sharding:
    """What a file of accelerate says, as YAML reads it."""
    kind = str(content.get("distributed_type", "NO")).upper()
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return WHOLE
    if kind == "FSDP":
        options = _mapping(content.get("fsdp_config"))
        reshards = options.get("fsdp_reshard_after_forward", True)
        return of_fsdp(
            str(options.get("fsdp_sharding_strategy", reshards)),
            offloads=bool(options.get("fsdp_offload_params", False)),
        )
    if kind == "DEEPSPEED":
        options = _mapping(content.get("deepspeed_config"))
        if "deepspeed_config_file" in options:
            raise FasttrError(
                f"{key}: got a deepspeed_config_file; wanted zero_stage in the file itself, or "
                "shard_size"
            )
        offloads = [str(options.get(f"offload_{x.lower()}_device", "none")) for x in _OFFLOADED]
        return of_zero(str(options.get("zero_stage", 2)), offloads)
    raise FasttrError(
        f"{key}: got distributed_type {kind}; wanted NO, MULTI_GPU, FSDP or DEEPSPEED"
    )


def of_fsdp(strategy: str, offloads: bool, per_machine: int = 0) -> Sharding:
    """`per_machine`: processes of each machine, for hybrid sharding; 0 where it is not known."""
    if offloads:
        raise FasttrError(
            "fsdp_offload_params: got true; weights are not kept in host memory: set it to false, "
            "or take more GPUs or use_peft"
        )
    name = strategy.upper()
    if name.startswith("HYBRID_SHARD") or name in ("4", "5"):
        return Sharding(per_machine)
    if name not in _STRATEGIES:
        raise FasttrError(
            f"fsdp_sharding_strategy: got {strategy!r}; wanted one of FULL_SHARD, SHARD_GRAD_OP, "
            "NO_SHARD, HYBRID_SHARD"
        )
    return _STRATEGIES[name]


def of_zero(stage: str, offloads: list[str]) -> Sharding:
    """Of a stage of DeepSpeed's ZeRO; DeepSpeed itself is not used."""
    if any(device not in ("none", "None", "") for device in offloads):
        raise FasttrError(
            "offload_optimizer_device, offload_param_device: weights and optimizer are not kept in "
            "host memory: set them to none, or take more GPUs or use_peft"
        )
    if stage not in _STAGES:
        raise FasttrError(f"zero_stage: got {stage!r}; wanted one of {', '.join(_STAGES)}")
    return _STAGES[stage]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
