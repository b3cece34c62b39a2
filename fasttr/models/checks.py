"""What stops a model that could not be exact when packed, before it is trained."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import Tree
from fasttr.errors import FasttrError, first_line
from fasttr.models.attention import own_attention
from fasttr.models.packed import PackedModel
from fasttr.models.sharded import Opaque
from fasttr.packing.layout import pack
from fasttr.packing.tiers import PADDED, SHARED, unshared


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
    missing = sorted(_parts_of_index(folder) - {file.name for file in files})
    if missing:
        raise FasttrError(
            f"{key}: {folder} lacks {missing[0]}, which its index of weights names; copy or "
            "download it again"
        )
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


def check_tensors(hf_config: Any, folder: Path, key: str, trust_remote_code: bool) -> None:
    """That a local folder holds every tensor of its model in its shape, by the headers alone.

    Says nothing where a folder has names that the model has not: transformers converts those.
    """
    from transformers import AutoModelForCausalLM

    stored = _stored_shapes(folder)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config), trust_remote_code=trust_remote_code
            )
            model.tie_weights()
    except Exception:  # any code of a repository runs here; loading says what is wrong
        return
    wanted = model.state_dict(keep_vars=True)
    if not stored or stored.keys() - wanted.keys():
        return
    there = {id(wanted[name]) for name in stored}  # a tied weight is stored once
    may_lack = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    missing = [
        name
        for name, tensor in wanted.items()
        if id(tensor) not in there and not any(re.search(one, name) for one in may_lack)
    ]
    if missing:
        raise FasttrError(
            f"{key}: {folder} lacks {len(missing)} weights ({missing[0]} first), which would be "
            "random; wanted a folder with all of them"
        )
    for name, shape in stored.items():
        if shape != list(wanted[name].shape):
            raise FasttrError(
                f"{key}: {folder} holds {name} of shape {shape}, and its config.json means "
                f"{list(wanted[name].shape)}; wanted the weights and the config of one model"
            )


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _parts_of_index(folder: Path) -> set[str]:
    """The files that a model's weights are said to lie in, where there are several."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file() or (folder / "model.safetensors").is_file():
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, OSError):
        return set()  # transformers says what is wrong with it


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


@torch.no_grad()
def check_forward(packed: PackedModel, key: str, name: str) -> None:
    """Log-probs of two short trees, with the loaded weights on the run's device, are near those of
    the model's own padded forward.

    The probe has held the structure to rounding, on a CPU. This finds what is wrong on this device
    or with this folder, on the mean of many tokens: in bf16 a single one may be far off where
    rounding sends it to other experts.
    """
    if packed.tier == PADDED or packed.shards is not None:
        return
    model, trees = packed.model, _two_trees(packed.model.config.get_text_config().vocab_size)
    apart = [unshared(Tree(t.row, t.prompt_ids, (c,))) for t in trees for c in t.completions]
    found = packed(pack(trees if packed.tier == SHARED else apart).to(packed.device)).token_logp
    implementation = model.config._attn_implementation
    model.set_attn_implementation(own_attention(model))
    try:
        padded = PackedModel(model, packed.head, bf16=packed.bf16, tier=PADDED)
        wanted = padded(pack(apart).to(packed.device)).token_logp
    finally:
        model.set_attn_implementation(implementation)
    distance = float((found - wanted).abs().mean() / (1.0 + wanted.abs().mean()))
    allowed = 0.05 if packed.bf16 else 1e-3
    if not distance <= allowed:
        raise FasttrError(
            f"{key}: log-probs of {name} in the tier {packed.tier} differ by {distance:.1e} from "
            f"those of its own padded forward (allowed {allowed:.0e}); attention_tier padded takes "
            "that one"
        )


def _two_trees(vocabulary: int) -> list[Tree]:
    generator = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return generator.integers(0, vocabulary, count, dtype=np.int32)

    return [Tree(0, ids(11), (ids(5), ids(9))), Tree(1, ids(3), (ids(2), ids(4)))]
