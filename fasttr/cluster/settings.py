"""The settings of `fasttr plan`."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.cluster.rates import CARDS
from fasttr.settings import REQUIRED, above, one_of, setting, whole


@dataclass(frozen=True)
class PlanSettings:
    """Plan."""

    model: str = setting(
        REQUIRED,
        None,
        "a folder, a config.json, or a published shape such as llama-3-8b, llama-3-70b",
    )
    gpus: int = setting(1, whole(1), "cards in all")
    card: str = setting("h100", one_of(*CARDS), "kind of the cards")
    gpus_per_node: int = setting(8, whole(1), "cards of a machine")
    memory_gib: float | None = setting(
        None, above(0), "memory of a card to plan with; none means 0.95 of what it has"
    )
    results: str | None = setting(
        None, None, "gpu.json of python -m bench tables, for measured rates; none assumes them"
    )
    train_batch_size: int = setting(64, whole(1), "pairs per optimizer step, over all cards")
    prompt_tokens: int = setting(128, whole(1), "tokens of a prompt, on average")
    completion_tokens: int = setting(256, whole(1), "tokens of a completion, on average")
    max_length: int = setting(1024, whole(2), "most tokens of a prompt with a completion")
    ref_update: str = setting("soft", one_of("none", "soft", "hard"), "how the reference moves")
    dtype: str = setting(
        "float32",
        one_of("float32", "bfloat16"),
        "what steps are made on: bfloat16 leaves out the other 16 bits of weights",
    )
    adam_moments: str | None = setting(
        None, one_of("fp32", "bf16", "int8"), "how moments are held; none lets the plan choose"
    )
    lora_r: int = setting(16, whole(1), "rank of adapters")
