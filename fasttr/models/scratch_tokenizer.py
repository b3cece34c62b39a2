"""Tokenizers from nothing: of bytes alone, or a byte-level BPE trained on a file."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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
