"""What stops a model that could not be exact when packed, before it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttr.batch import Tree
from fasttr.errors import FasttrError, first_line
from fasttr.models.packed import PackedModel
from fasttr.models.sharded import Opaque
from fasttr.packing.layout import pack


def check_causal(config: Any, key: str) -> None:
    """Raise FasttrError, under the setting `key`, where transformers has no causal LM."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise FasttrError(
            f"{key}: got architecture {config.model_type!r}, of which transformers has no causal "
            "language model; wanted a model that generates text"
        )


def check_given(model: Any, key: str) -> None:
    """Raise FasttrError where an object is no causal LM of transformers."""
    if not hasattr(model, "config") or model.get_output_embeddings() is None:
        raise FasttrError(
            f"{key}: got a {type(model).__name__}; wanted a causal language model of transformers"
        )


def check_no_adapter(folder: Path, key: str) -> None:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise FasttrError(
            f"{key}: {folder} holds an adapter (LoRA) and not a model; merge it into its base "
            "(merge_and_unload of peft) and save that"
        )


def check_not_quantised(config: Any, key: str, name: str) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise FasttrError(
            f"{key}: {name} is quantised ({method or 'it has a quantization_config'}); wanted the "
            "weights in full precision"
        )


def check_weight_files(folder: Path, key: str) -> None:
    """That the safetensors of a local folder are there and whole, by their headers alone."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FasttrError(
            f"{key}: {folder} holds no safetensors weights, and pickled ones (pytorch_model.bin) "
            "can run code when they are read; convert them with save_pretrained"
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FasttrError(
                f"{key}: cannot load {file}: {first_line(error)}; copy or download it again"
            ) from error


def check_rope(config: Any, name: str, max_length: int | None) -> None:
    """Rotary embeddings that depend on the longest position of a row would depend on the pack."""
    rope = getattr(config, "rope_parameters", None) or {}
    scopes = [rope] if "rope_type" in rope else [s for s in rope.values() if isinstance(s, dict)]
    kinds = {scope.get("rope_type", "default") for scope in scopes}
    ranges = [scope.get("original_max_position_embeddings") or 0 for scope in scopes]
    if not kinds & {"dynamic", "longrope"}:
        return
    limit = max(ranges, default=0) or config.max_position_embeddings
    if max_length is None or max_length > limit:
        raise FasttrError(
            f"max_length: got {max_length} with {name}, whose rotary embedding depends on the "
            f"longest position of a row beyond {limit}, so that a pack would change it; wanted "
            f"max_length of at most {limit}"
        )


def check_positions(config: Any, longest: int, name: str) -> None:
    """Learned positions end with their table; rotary ones and those of states do not."""
    positions = getattr(config, "max_position_embeddings", None)
    has_rotary = getattr(config, "rope_parameters", None)
    if positions is not None and not has_rotary and longest > positions:
        raise FasttrError(
            f"max_length: the longest row has {longest} tokens and {name} has {positions} "
            f"positions; wanted max_length of at most {positions}"
        )


def check_finite(parameters: Iterable[tuple[str, Tensor]], key: str, name: str) -> None:
    for weight, parameter in parameters:
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


def check_head(packed: PackedModel, key: str, name: str) -> None:
    """The log-probs of eight tokens equal those of the model's own forward.

    So a head with an unknown scale, soft-cap or extra layer is refused rather than approximated.
    """
    worst = head_error(packed)
    # bf16 logits of the model's own head are rounded to 8 bits; the fused head keeps fp32.
    allowed = 0.01 if packed.bf16 else 1e-4
    if not worst <= allowed:
        raise FasttrError(
            f"{key}: the head of {name} is not softcap(W h + b): log-probs of eight tokens differ "
            f"by {worst:.2e} of its largest logit from the model's own forward (allowed "
            f"{allowed:.1e})"
        )


@torch.no_grad()
def head_error(packed: PackedModel) -> float:
    """How far the log-probs of eight tokens are from the model's own, relative to its largest
    logit."""
    model = packed.model
    ids = torch.arange(8) % model.config.get_text_config().vocab_size
    batch = pack([Tree(0, ids[:1].numpy(), (ids[1:].numpy(),))]).to(packed.device)
    own_logits = packed.own_logits(Opaque(batch))[:-1]
    own_logits = own_logits.to(torch.promote_types(own_logits.dtype, torch.float32))
    own_logps = torch.log_softmax(own_logits, dim=-1).gather(1, batch.target[:, None])[:, 0]
    worst = (packed(batch).token_logp - own_logps).abs().max()
    return float(worst / (1.0 + own_logits.abs().max()))
