"""A model from nothing: random weights and a tokenizer trained on a file, as a Hugging Face folder.

So anyone can run, test and compare without a download. Nothing here is specific to fasttr: the
folder loads in transformers (`AutoTokenizer`, `AutoModelForCausalLM`), in TRL and wherever Hugging
Face folders are read.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.errors import FasttrError

# PAD is a token of its own: with PAD = EOS a collator that masks PAD would mask the EOS that has to
# be learned.
PAD, BOS, IM_START, IM_END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
# Ids 0, 1, 2, 3. EOS is <|im_end|>, the token that ends an assistant's turn: so one id ends a chat
# answer and (appended by the trainer) a plain completion alike, and generation stops on either
# without further settings.
SPECIAL_TOKENS = (PAD, BOS, IM_START, IM_END)
BYTES = 256

# No BOS here: messages open with <|im_start|>, and text rendered by the template may still pass
# through the tokenizer's call, which would then put a second BOS in front.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- set parts = message['content'] | default([], true) | selectattr('text') %}
        {{- parts | map(attribute='text') | join }}
    {%- endif %}
    {{- (message['tool_calls'] | tojson if message['tool_calls'] else '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class Arch(NamedTuple):
    """What sets one architecture apart from the others in its transformers config."""

    model_type: str
    head_dim: bool = (
        False  # the config names it, with a default that does not follow the other sizes
    )
    kv_heads: bool = True  # grouped-query attention exists
    sliding_window: int | None = (
        0  # default window; None: full attention unless asked for; 0: no window exists
    )
    full_every: int = 0  # every so many layers one is full, the others have the window
    rotary_multiple: int = 2  # the head dimension must be a multiple of this


ARCHS = {
    "llama": Arch("llama", head_dim=True),
    "qwen3": Arch("qwen3", head_dim=True),
    "mistral": Arch("mistral", head_dim=True, sliding_window=None),
    "gemma2": Arch("gemma2", head_dim=True, sliding_window=4096, full_every=2),
    "gemma3": Arch("gemma3_text", head_dim=True, sliding_window=512, full_every=6),
    # A quarter of each head rotates, in pairs: hence multiples of 8.
    "gpt_neox": Arch("gpt_neox", kv_heads=False, rotary_multiple=8),
    "phi3": Arch("phi3", sliding_window=None),
    "olmo2": Arch("olmo2"),
}  # no qwen2: for that type transformers replaces any tokenizer by Qwen's own


def init_model(
    arch: str,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    vocab_size: int = 2000,
    tokenizer_data: str | Path | None = None,
    output_dir: str | Path = "model",
    seed: int = 0,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 4096,
    sliding_window: int | None = None,
    tie_word_embeddings: bool | None = None,
) -> None:
    """Write a Hugging Face folder: a random model, its tokenizer with a ChatML template, its
    generation config.

    Weights are fp32, drawn by the architecture's own initialisation from `seed` alone (the caller's
    random state is left as it was): the same arguments give the same bytes. The folder is written
    beside `output_dir` and renamed.

    arch: one of `ARCHS`. `None` means the architecture's own choice for `num_kv_heads` (=
    num_heads), `sliding_window` (a window of that many tokens, the token itself included) and
    `tie_word_embeddings`; `intermediate_size` is 8/3 hidden_size rounded up to a multiple of 64.

    tokenizer_data: plain UTF-8 text, or JSON, JSON lines or Parquet (text and JSON also as .gz), of
    which every string of every row is read, messages included. On it a byte-level BPE is trained:
    nothing is unknown, any Unicode round-trips. A file too small for `vocab_size` tokens gives
    fewer of them, and the model keeps `vocab_size` rows.
    `None`: the pure byte tokenizer (`byte_tokenizer`), and `vocab_size` is 260 whatever was given.

    BOS is added by the tokenizer's call (plain text, prompts included) and never by the chat
    template, so no path yields two. EOS is <|im_end|>: see `SPECIAL_TOKENS`.

    Raises FasttrError: unknown architecture, sizes that do not fit together, a missing, empty or
    broken file, a vocabulary below the 256 bytes and 4 special tokens, an `output_dir` that is not
    empty.
    """
    for name, value in locals().items():
        if isinstance(value, int) and value < 1 and name not in ("seed", "tie_word_embeddings"):
            raise FasttrError(f"{name} is {value}; wanted 1 or more")
    target = Path(output_dir)
    if target.is_dir() and any(target.iterdir()):
        raise FasttrError(
            f"output_dir {target} is not empty; init writes a new folder: name another, or remove "
            "it"
        )
    if target.exists() and not target.is_dir():
        raise FasttrError(f"output_dir {target} is a file; wanted a folder that is new or empty")
    spec = _spec(arch)
    sizes = _checked_sizes(
        arch, spec, hidden_size, num_layers, num_heads, num_kv_heads, sliding_window
    )
    sizes |= {
        "intermediate_size": intermediate_size or -(-8 * hidden_size // (3 * 64)) * 64,
        "max_position_embeddings": max_position_embeddings,
    }
    if tie_word_embeddings is not None:
        sizes["tie_word_embeddings"] = tie_word_embeddings
    if tokenizer_data is None:
        tokenizer, vocab_size = byte_tokenizer(), BYTES + len(SPECIAL_TOKENS)
    else:
        tokenizer = train_tokenizer(tokenizer_data, vocab_size)
    tokenizer.model_max_length = max_position_embeddings

    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = AutoConfig.for_model(spec.model_type, vocab_size=vocab_size, **sizes, **ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ids)

    aside = target.parent / f".{target.name}.{os.getpid()}"
    try:
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        os.replace(aside, target)
    except (OSError, SafetensorError) as error:
        raise FasttrError(
            f"could not write {target}: {error}; make room or name another"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _spec(arch: str) -> Arch:
    if arch not in ARCHS:
        near = difflib.get_close_matches(arch, ARCHS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FasttrError(f"arch is {arch!r}; wanted one of {', '.join(ARCHS)}{hint}")
    return ARCHS[arch]


def _checked_sizes(
    arch: str,
    spec: Arch,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int | None,
    window: int | None,
) -> dict[str, Any]:
    kv_heads = heads if kv_heads is None else kv_heads
    if hidden % heads:
        raise FasttrError(
            f"hidden_size {hidden} is not divisible by num_heads {heads}; change one of them"
        )
    head_dim = hidden // heads
    if head_dim % spec.rotary_multiple:
        raise FasttrError(
            f"hidden_size / num_heads is {head_dim}; the rotary embedding of {arch} wants a "
            "multiple of "
            f"{spec.rotary_multiple}: change one of them"
        )
    if heads % kv_heads:
        raise FasttrError(
            f"num_heads {heads} is not divisible by num_kv_heads {kv_heads}; change one of them"
        )
    if kv_heads != heads and not spec.kv_heads:
        raise FasttrError(
            f"num_kv_heads is {kv_heads}; {arch} has none apart from its {heads} heads: leave it "
            "out"
        )
    if window is not None and spec.sliding_window == 0:
        raise FasttrError(
            f"sliding_window is {window}; {arch} has none: leave it out, or take mistral or gemma3"
        )
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if spec.kv_heads:
        sizes["num_key_value_heads"] = kv_heads
    if spec.sliding_window != 0:
        sizes["sliding_window"] = spec.sliding_window if window is None else window
    if spec.head_dim:
        sizes["head_dim"] = head_dim
    if spec.full_every:
        # The last layer is always full: with the stock pattern a shallow Gemma 3 would see its
        # window alone.
        full = [(i + 1) % spec.full_every == 0 or i == layers - 1 for i in range(layers)]
        sizes["layer_types"] = ["full_attention" if f else "sliding_attention" for f in full]
        sizes["query_pre_attn_scalar"] = head_dim
    return sizes


def byte_tokenizer() -> Any:
    """The tokenizer of 260 tokens, one a byte and four special: nothing to train, and lengths are
    UTF-8 lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=[])))


def train_tokenizer(path: str | Path, vocab_size: int) -> Any:
    """A byte-level BPE of at most `vocab_size` tokens, special ones included, trained on every text
    of the file."""
    least = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise FasttrError(
            f"vocab_size is {vocab_size}; wanted {least} or more: {BYTES} bytes and the special "
            "tokens"
        )
    texts = read_texts(path)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise FasttrError(
            f"{path} holds no text; wanted plain text, JSON, JSON lines or Parquet with text in it"
        )

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    def all_texts() -> Iterator[str]:
        yield first
        yield from texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(all_texts(), trainer)
    return _wrap(tokenizer)


def _wrap(tokenizer: Any) -> Any:
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=IM_END,
        pad_token=PAD,
        additional_special_tokens=[IM_START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def read_texts(path: str | Path) -> Iterator[str]:
    """Every string of a data file (.json, .jsonl, .parquet), or the lines of a text file; .gz of
    either."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FasttrError(
            f"tokenizer_data {path} {what}; wanted a text, JSON, JSON lines or Parquet file"
        )
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        if kind == ".parquet":
            import pyarrow.parquet as parquet  # type: ignore[import-untyped]

            for batch in parquet.ParquetFile(path).iter_batches():
                yield from _strings(batch.to_pylist())
            return
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            if kind in (".json", ".jsonl"):
                yield from _json_texts(lines, path, whole=kind == ".json")
            else:
                yield from lines
    except FasttrError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise FasttrError(
            f"cannot read {path}: {error}; wanted UTF-8 text, JSON, JSON lines or Parquet"
        ) from error


def _json_texts(lines: Iterable[str], path: Path, whole: bool) -> Iterator[str]:
    if whole:
        text = "".join(lines)
        try:
            yield from _strings(json.loads(text))
            return
        except json.JSONDecodeError:  # JSON lines are often named .json too
            lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FasttrError(
                    f"{path}, line {number}: broken JSON ({error.msg}); mend or remove it"
                ) from error
            yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
