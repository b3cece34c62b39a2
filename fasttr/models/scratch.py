"""A model from nothing: random weights and a tokenizer trained on a file, as a Hugging Face folder.

So anyone can run, test and compare without a download. Nothing here is specific to fasttr: the
folder loads in transformers (`AutoTokenizer`, `AutoModelForCausalLM`), in TRL and wherever Hugging
Face folders are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.errors import FasttrError
from fasttr.files import written_aside
from fasttr.models.scratch_tokenizer import BYTES, SPECIAL_TOKENS, byte_tokenizer, train_tokenizer
from fasttr.settings import REQUIRED, check_ranges, one_of, setting, whole


class Arch(NamedTuple):
    """What sets one architecture apart from the others in its transformers config."""

    model_type: str
    head_dim: bool = False  # the config names it, with a default that does not follow other sizes
    kv_heads: bool = True  # grouped-query attention exists
    window: bool = False  # a sliding window exists
    default_window: int | None = None  # None: full attention unless asked for
    full_every: int = 0  # every so many layers one is full, the others have the window
    rotary_multiple: int = 2  # the head dimension must be a multiple of this


ARCHS = {
    "llama": Arch("llama", head_dim=True),
    "qwen3": Arch("qwen3", head_dim=True),
    "mistral": Arch("mistral", head_dim=True, window=True),
    "gemma2": Arch("gemma2", head_dim=True, window=True, default_window=4096, full_every=2),
    "gemma3": Arch("gemma3_text", head_dim=True, window=True, default_window=512, full_every=6),
    # A quarter of each head rotates, in pairs: hence multiples of 8.
    "gpt_neox": Arch("gpt_neox", kv_heads=False, rotary_multiple=8),
    "phi3": Arch("phi3", window=True),
    "olmo2": Arch("olmo2"),
}  # no qwen2: for that type transformers replaces any tokenizer by Qwen's own


@dataclass(frozen=True)
class ScratchSettings:
    """Model."""

    arch: str = setting(REQUIRED, one_of(*ARCHS), "architecture of the model")
    hidden_size: int = setting(128, whole(1), "width, a multiple of num_heads")
    num_layers: int = setting(2, whole(1), "decoder layers")
    num_heads: int = setting(4, whole(1), "attention heads")
    vocab_size: int = setting(
        2000,
        whole(1),
        "rows of the embedding, and most tokens of the tokenizer; 260 without tokenizer_data",
    )
    tokenizer_data: str | None = setting(
        None,
        None,
        "text, or JSON, JSON lines or Parquet (text and JSON also as .gz), of which every string "
        "trains a byte-level BPE; none means one token a byte",
    )
    output_dir: str = setting("model", None, "folder to write, new or empty")
    seed: int = setting(0, None, "seed of the weights")
    num_kv_heads: int | None = setting(
        None, whole(1), "heads of keys and values; none means num_heads"
    )
    intermediate_size: int | None = setting(
        None, whole(1), "width of the MLP; none means 8/3 hidden_size, a multiple of 64"
    )
    max_position_embeddings: int = setting(4096, whole(1), "longest sequence")
    sliding_window: int | None = setting(
        None, whole(1), "tokens of the window, itself included; none is the architecture's choice"
    )
    tie_word_embeddings: bool | None = setting(
        None, None, "one weight for embedding and head; none is the architecture's choice"
    )


def init_model(arch: str, **settings: Any) -> int:
    """Write a Hugging Face folder: a random model, its tokenizer with a ChatML template, its
    generation config; returns its number of parameters. The keyword arguments are those of
    `ScratchSettings`.

    Weights are fp32, drawn by the architecture's own initialisation from `seed` alone (the caller's
    random state is left as it was): the same arguments give the same bytes. The folder is written
    beside `output_dir` and renamed.

    With `tokenizer_data` nothing is unknown and any Unicode round-trips; a file too small for
    `vocab_size` tokens gives fewer of them, and the model keeps `vocab_size` rows. BOS is added by
    the tokenizer's call (plain text, prompts included) and never by the chat template, so no path
    yields two. EOS is <|im_end|>: see `SPECIAL_TOKENS`.

    Raises FasttrError: unknown architecture, sizes that do not fit together, a missing, empty or
    broken file, a vocabulary below the 256 bytes and 4 special tokens, an `output_dir` that is not
    empty.
    """
    wanted = ScratchSettings(arch=arch, **settings)
    check_ranges(wanted)
    target = _new_folder(wanted.output_dir)
    sizes = _sizes(wanted, ARCHS[wanted.arch])
    if wanted.tokenizer_data is None:
        tokenizer, vocab_size = byte_tokenizer(), BYTES + len(SPECIAL_TOKENS)
    else:
        vocab_size = wanted.vocab_size
        tokenizer = train_tokenizer(wanted.tokenizer_data, vocab_size)
    tokenizer.model_max_length = wanted.max_position_embeddings
    model = _random_model(wanted, {**sizes, "vocab_size": vocab_size}, tokenizer)
    _save(model, tokenizer, target)
    return sum(parameter.numel() for parameter in model.parameters())


def _new_folder(output_dir: str | Path) -> Path:
    target = Path(output_dir)
    if target.is_dir() and any(target.iterdir()):
        raise FasttrError(
            f"output_dir {target} is not empty; init writes a new folder: name another, or remove "
            "it"
        )
    if target.exists() and not target.is_dir():
        raise FasttrError(f"output_dir {target} is a file; wanted a folder that is new or empty")
    return target


def _sizes(wanted: ScratchSettings, spec: Arch) -> dict[str, Any]:
    """The sizes that transformers' config takes, checked to fit together."""
    hidden, heads = wanted.hidden_size, wanted.num_heads
    if hidden % heads:
        raise FasttrError(
            f"hidden_size {hidden} is not divisible by num_heads {heads}; change one of them"
        )
    head_dim = hidden // heads
    if head_dim % spec.rotary_multiple:
        raise FasttrError(
            f"hidden_size / num_heads is {head_dim}; the rotary embedding of {wanted.arch} wants "
            f"a multiple of {spec.rotary_multiple}: change one of them"
        )
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": wanted.num_layers,
        "num_attention_heads": heads,
        "intermediate_size": wanted.intermediate_size or -(-8 * hidden // (3 * 64)) * 64,
        "max_position_embeddings": wanted.max_position_embeddings,
        **_kv_heads(wanted, spec),
        **_window(wanted, spec),
    }
    if spec.head_dim:
        sizes["head_dim"] = head_dim
    if spec.full_every:
        sizes["query_pre_attn_scalar"] = head_dim
    if wanted.tie_word_embeddings is not None:
        sizes["tie_word_embeddings"] = wanted.tie_word_embeddings
    return sizes


def _kv_heads(wanted: ScratchSettings, spec: Arch) -> dict[str, Any]:
    heads = wanted.num_heads
    kv_heads = heads if wanted.num_kv_heads is None else wanted.num_kv_heads
    if heads % kv_heads:
        raise FasttrError(
            f"num_heads {heads} is not divisible by num_kv_heads {kv_heads}; change one of them"
        )
    if kv_heads != heads and not spec.kv_heads:
        raise FasttrError(
            f"num_kv_heads is {kv_heads}; {wanted.arch} has none apart from its {heads} heads: "
            "leave it out"
        )
    return {"num_key_value_heads": kv_heads} if spec.kv_heads else {}


def _window(wanted: ScratchSettings, spec: Arch) -> dict[str, Any]:
    window = wanted.sliding_window
    if not spec.window:
        if window is not None:
            raise FasttrError(
                f"sliding_window is {window}; {wanted.arch} has none: leave it out, or take "
                "mistral or gemma3"
            )
        return {}
    sizes: dict[str, Any] = {"sliding_window": spec.default_window if window is None else window}
    if spec.full_every:
        # The last layer is always full: with the stock pattern a shallow Gemma 3 would see its
        # window alone.
        last = wanted.num_layers - 1
        is_full = [(i + 1) % spec.full_every == 0 or i == last for i in range(last + 1)]
        sizes["layer_types"] = [
            "full_attention" if full else "sliding_attention" for full in is_full
        ]
    return sizes


def _random_model(wanted: ScratchSettings, sizes: dict[str, Any], tokenizer: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = AutoConfig.for_model(ARCHS[wanted.arch].model_type, **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(wanted.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ids)
    return model


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        with written_aside(target) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    except (OSError, SafetensorError) as error:
        raise FasttrError(
            f"could not write {target}: {error}; make room or name another"
        ) from error
