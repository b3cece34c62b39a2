"""Loading and saving a causal language model whose attention is packed, and refusing those that
cannot be exact."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttr.batch import Tree
from fasttr.errors import FasttrError
from fasttr.models import attention
from fasttr.models.packed import HeadSpec, PackedModel
from fasttr.packing.layout import pack

# Each is held to "packed = prefix-shared = padded = alone" by tests/test_equivalence.py.
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


def attention_backend(asked: str | None, device: torch.device, bf16: bool) -> str:
    """The back end of packed attention for `attn_implementation`; what was asked for and is missing
    stops."""
    if asked in ("sdpa", "eager", "segments"):
        return "segments"
    if asked is None:
        return "varlen" if device.type == "cuda" and bf16 else "segments"
    if asked in ("varlen", "flash_attention_2"):
        if device.type != "cuda" or not bf16:
            raise FasttrError(
                f"attn_implementation: got {asked} on {device.type} with bf16 {str(bf16).lower()}; "
                "wanted a CUDA "
                "device with bf16 true; leave attn_implementation out to run everywhere"
            )
        if asked == "varlen":
            return "varlen"
        try:
            import flash_attn  # noqa: F401
        except ImportError as error:
            raise FasttrError(
                "attn_implementation: flash_attention_2 needs the package flash-attn; run pip "
                "install 'fasttr[flash]', "
                "or leave attn_implementation out to use torch's own varlen attention"
            ) from error
        return "flash"
    raise FasttrError(
        f"attn_implementation: got {asked!r}; wanted one of sdpa, eager, varlen, "
        "flash_attention_2, or none"
    )


def load_config(name: str, revision: str = "main") -> Any:
    """The transformers config of a folder or hub id, checked for an architecture that is exact when
    packed."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise FasttrError(
            f"model_name_or_path: there is no folder {name}; wanted a Hugging Face folder or a hub "
            "id"
        )
    try:
        # The type is read before the config is built: an architecture we refuse may not even be
        # known.
        kind = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type")
        if kind not in ARCHITECTURES:
            raise FasttrError(
                f"model_name_or_path: got architecture {kind!r}, which has not been shown to share "
                "prefixes exactly; "
                f"wanted one of {', '.join(ARCHITECTURES)}"
            )
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except FasttrError:
        raise
    except (OSError, ValueError, AttributeError, TypeError, StrictDataclassError) as error:
        raise FasttrError(
            f"model_name_or_path: cannot read {name!r}: {_first_line(error)}"
        ) from error
    unknown = sorted(
        set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    )
    if unknown:
        raise FasttrError(
            f"model_name_or_path: {name} has layers of type {', '.join(unknown)}, which carry "
            "state across tokens and "
            "cannot share a prefix; wanted full or sliding attention only"
        )
    return config


def dropout_rates(config: Any) -> list[str]:
    """The keys of a transformers config that set dropout above 0."""
    return [
        key
        for key, value in vars(config).items()
        if "dropout" in key and isinstance(value, float) and value > 0
    ]


def load_model(
    name: str,
    *,
    device: torch.device,
    bf16: bool = False,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    use_liger_kernel: bool = False,
    max_length: int | None = None,
    revision: str = "main",
    ld_alpha: float | None = None,
) -> PackedModel:
    """Read fp32 weights and make them score packed trees.

    Dropout is 0 everywhere. The logits of eight tokens are compared with the model's own forward,
    so that a head with an unknown scale, soft-cap or extra layer is refused rather than
    approximated.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if use_liger_kernel and device.type != "cuda":
        raise FasttrError(
            f"use_liger_kernel: got true on {device.type}; Liger's kernels need CUDA: leave it out"
        )
    config = load_config(name, revision)
    _refuse_stretched_rope(config, name, max_length)
    original = copy.deepcopy(config)
    for key in dropout_rates(config):
        setattr(config, key, 0.0)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention.register(),
            use_safetensors=True,
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "no file named model.safetensors" in str(error):
            raise FasttrError(
                f"model_name_or_path: {name} holds no safetensors weights, and pickled ones "
                "(pytorch_model.bin) can "
                "run code when they are read; convert them with save_pretrained"
            ) from error
        raise FasttrError(
            f"model_name_or_path: cannot load {name!r}: {_first_line(error)}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise FasttrError(
            f"model_name_or_path: {name} lacks {len(missing)} weights ({missing[0]} first), which "
            "would be random"
        )
    model.fasttr_config = original
    _refuse_nonfinite(model, name)
    model.to(device).train()
    if use_liger_kernel:
        _apply_liger(model)
    if gradient_checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    head = HeadSpec(softcap=getattr(config, "final_logit_softcapping", None))
    packed = PackedModel(
        model, head, attention_backend(attn_implementation, device, bf16), bf16, ld_alpha
    )
    _check_head(packed, name)
    return packed


@contextlib.contextmanager
def own_config(model: Any) -> Iterator[None]:
    """Within, the model carries the config it was loaded with, dropout included: what a saved
    folder must say."""
    changed, model.config = model.config, model.fasttr_config
    try:
        yield
    finally:
        model.config = changed


def save_model(packed: PackedModel, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer, chat template."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with own_config(packed.model):
        packed.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(name: str, revision: str = "main") -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        if "trust_remote_code" in str(error):
            raise FasttrError(
                f"model_name_or_path: the tokenizer of {name} is code from its own repository, "
                "which is not run"
            ) from error
        raise FasttrError(
            f"model_name_or_path: no tokenizer in {name!r}: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _refuse_stretched_rope(config: Any, name: str, max_length: int | None) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    scopes = [rope] if "rope_type" in rope else [s for s in rope.values() if isinstance(s, dict)]
    kinds = {scope.get("rope_type", "default") for scope in scopes}
    original = max(
        (scope.get("original_max_position_embeddings") or 0 for scope in scopes), default=0
    )
    limit = original or config.max_position_embeddings
    if kinds & {"dynamic", "longrope"} and (max_length is None or max_length > limit):
        raise FasttrError(
            f"max_length: got {max_length} with {name}, whose rotary embedding depends on the "
            "longest position of a "
            f"row beyond {limit}, so that a pack would change it; wanted max_length of at most "
            f"{limit}"
        )


def _refuse_nonfinite(model: nn.Module, name: str) -> None:
    for key, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise FasttrError(
                f"model_name_or_path: {name} holds NaN or infinity in {key}; wanted finite weights"
            )


def liger_is_usable(name: str, device: torch.device) -> bool:
    """Whether liger-kernel is installed, the device is CUDA and it has kernels for the architecture
    in `name`."""
    if device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return load_config(name).model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def _apply_liger(model: Any) -> None:
    """Liger's norm, rotary and MLP kernels; never its losses, which the fused head replaces."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise FasttrError(
            "use_liger_kernel: needs the package liger-kernel; run pip install 'fasttr[cuda]'"
        ) from error
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        raise FasttrError(
            f"use_liger_kernel: liger-kernel has none for {model.config.model_type}; set it to "
            "false"
        )
    accepted = inspect.signature(apply).parameters
    wanted = {
        "rope": True,
        "rms_norm": True,
        "layer_norm": True,
        "swiglu": True,
        "geglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }
    apply(model=model, **{key: value for key, value in wanted.items() if key in accepted})


@torch.no_grad()
def _check_head(packed: PackedModel, name: str) -> None:
    model = packed.model
    if model.base_model is model:
        raise FasttrError(f"model_name_or_path: {name} has no base model apart from its head")
    ids = torch.arange(8) % model.config.vocab_size
    batch = pack([Tree(0, ids[:1].numpy(), (ids[1:].numpy(),))]).to(packed.device)
    with torch.autocast(packed.device.type, torch.bfloat16, enabled=packed.bf16):
        own = (
            model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                fasttr_layout=batch.attention,
                fasttr_backend=packed.attention_backend,
            )
            .logits[0, :-1]
            .float()
        )
    expected = torch.log_softmax(own, dim=-1).gather(1, batch.target[:, None])[:, 0]
    got = packed(batch).token_logp
    # bf16 logits of the model's own head are rounded to 8 bits; the fused head keeps fp32.
    tolerance = (
        0.02 * float(own.abs().max()) + 1e-2
        if packed.bf16
        else 1e-4 * (1.0 + float(own.abs().max()))
    )
    worst = float((got - expected).abs().max())
    if not worst <= tolerance:
        raise FasttrError(
            f"model_name_or_path: the head of {name} is not softcap(W h + b): log-probs of eight "
            "tokens differ by "
            f"{worst:.2e} nats from the model's own forward (allowed {tolerance:.1e})"
        )
