"""Settings of low-rank adapters and of several processes."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.settings import between, one_of, setting, whole


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA."""

    use_peft: bool = setting(
        False,
        None,
        "train a low-rank adapter of the model, whose own weights are frozen; needs the package "
        "peft",
    )
    lora_r: int = setting(16, whole(1), "rank of the adapter")
    lora_alpha: int = setting(
        32, whole(1), "the adapter's update is multiplied by lora_alpha / lora_r"
    )
    lora_target_modules: str | list[str] | None = setting(
        None,
        None,
        "names of the modules that are adapted, or all-linear; none means peft's choice for the "
        "architecture",
    )
    lora_target_parameters: list[str] | None = setting(
        None, None, "names of parameters that are adapted although no linear module holds them"
    )
    lora_modules_to_save: list[str] | None = setting(
        None, None, "names of modules that are trained whole and saved with the adapter"
    )
    use_rslora: bool = setting(
        False, None, "multiply the adapter's update by lora_alpha / sqrt(lora_r) instead"
    )
    use_dora: bool = setting(
        False,
        None,
        "train the magnitude of every adapted weight too (DoRA); not with ref_update soft",
    )
    load_in_4bit: bool = setting(
        False,
        None,
        "hold the frozen matrices under an adapter in 4 bits (QLoRA); needs the package "
        "bitsandbytes and whole weights in every process",
    )
    bnb_4bit_quant_type: str = setting(
        "nf4", one_of("nf4", "fp4"), "which 4 bits; read only with load_in_4bit"
    )
    use_bnb_nested_quant: bool = setting(
        False, None, "with load_in_4bit, hold the scales of its blocks in 8 bits"
    )
    ref_lora_rank: int | None = setting(
        None,
        whole(1),
        "largest rank of a soft reference, which is an average of adapters; none means 6 times "
        "lora_r",
    )
    ref_lora_tolerance: float = setting(
        1e-6,
        between(0, 1),
        "share of the norm of its product that a soft reference may leave out to need a lower rank",
    )
    merge_adapter: bool = setting(
        False,
        None,
        "the final model is the base with the adapter merged, not the adapter alone",
        may_change=True,
    )


@dataclass(frozen=True)
class LaunchSettings:
    """Processes."""

    num_processes: int | None = setting(
        None,
        whole(1),
        "processes, one for each GPU, that fasttr starts on this machine; under torchrun or "
        "accelerate it must be theirs, and none takes what there is",
        may_change=True,
    )
    shard_size: int | None = setting(
        None,
        whole(0),
        "processes that divide one copy of the weights among them (FSDP2); 1 keeps it whole in "
        "each, 0 divides it among all, a machine's number makes a copy on each machine, and none "
        "is what accelerate asks for, else 1",
        may_change=True,
    )
    reshard_after_forward: bool = setting(
        True,
        None,
        "with divided weights, let go of a layer after the forward and gather it again for the "
        "backward; false is faster and needs room for the whole model",
        may_change=True,
    )
    ddp_timeout: int = setting(
        1800,
        whole(1),
        "seconds after which a process that no other answers gives up",
        may_change=True,
    )
