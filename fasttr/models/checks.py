"""What stops a model that could not be exact when packed, before it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasttr.batch import PackedBatch, Tree
from fasttr.errors import FasttrError
from fasttr.models.packed import PackedModel
from fasttr.packing.layout import pack

# Each is held to "packed = prefix-shared = padded = alone" by tests/models/test_equivalence.py.
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
)
LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_architecture(kind: str | None, key: str) -> None:
    """Raise FasttrError, under the setting `key`, for a model type that is not of the list."""
    if kind not in ARCHITECTURES:
        raise FasttrError(
            f"{key}: got architecture {kind!r}, which has not been shown to share prefixes "
            f"exactly; wanted one of {', '.join(ARCHITECTURES)}"
        )


def check_layers(config: Any, key: str, name: str) -> None:
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if unknown:
        raise FasttrError(
            f"{key}: {name} has layers of type {', '.join(unknown)}, which carry state across "
            "tokens and cannot share a prefix; wanted full or sliding attention only"
        )


def check_rope(config: Any, name: str, max_length: int | None) -> None:
    """Rotary embeddings that depend on the longest position of a row would depend on the pack."""
    rope = getattr(config, "rope_parameters", None) or {}
    scopes = [rope] if "rope_type" in rope else [s for s in rope.values() if isinstance(s, dict)]
    kinds = {scope.get("rope_type", "default") for scope in scopes}
    ranges = [scope.get("original_max_position_embeddings") or 0 for scope in scopes]
    limit = max(ranges, default=0) or config.max_position_embeddings
    if kinds & {"dynamic", "longrope"} and (max_length is None or max_length > limit):
        raise FasttrError(
            f"max_length: got {max_length} with {name}, whose rotary embedding depends on the "
            f"longest position of a row beyond {limit}, so that a pack would change it; wanted "
            f"max_length of at most {limit}"
        )


def check_finite(model: nn.Module, key: str, name: str) -> None:
    for weight, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FasttrError(
                f"{key}: {name} holds NaN or infinity in {weight}; wanted finite weights"
            )


def check_ids(packed: PackedModel, largest_id: int, key: str, name: str) -> None:
    """Raise FasttrError when the model has no embedding for a token of the rows."""
    rows = packed.model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise FasttrError(
            f"{key}: the rows hold token {largest_id}, and the embedding of {name} has {rows} "
            "rows; wanted one for every token: resize it (model.resize_token_embeddings), or use "
            "the tokenizer that belongs to it"
        )


@torch.no_grad()
def check_head(packed: PackedModel, key: str, name: str) -> None:
    """The log-probs of eight tokens equal those of the model's own forward.

    So a head with an unknown scale, soft-cap or extra layer is refused rather than approximated.
    """
    model = packed.model
    if model.base_model is model:
        raise FasttrError(f"{key}: {name} has no base model apart from its head")
    ids = torch.arange(8) % model.config.vocab_size
    tree = Tree(0, ids[:1].numpy(), (ids[1:].numpy(),))
    batch = pack([tree]).to(packed.device)
    own_logits = _own_logits(packed, batch)
    own_logps = torch.log_softmax(own_logits, dim=-1).gather(1, batch.target[:, None])[:, 0]
    worst = float((packed(batch).token_logp - own_logps).abs().max())
    largest = float(own_logits.abs().max())
    # bf16 logits of the model's own head are rounded to 8 bits; the fused head keeps fp32.
    allowed = 0.02 * largest + 1e-2 if packed.bf16 else 1e-4 * (1.0 + largest)
    if not worst <= allowed:
        raise FasttrError(
            f"{key}: the head of {name} is not softcap(W h + b): log-probs of eight tokens differ "
            f"by {worst:.2e} nats from the model's own forward (allowed {allowed:.1e})"
        )


def _own_logits(packed: PackedModel, batch: PackedBatch) -> Tensor:
    with packed.autocast():
        output = packed.model(**packed.attention_inputs(batch))
    return output.logits[0, :-1].float()
