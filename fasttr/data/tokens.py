"""Text to token ids, by TRL 1.16's rules: templates, BOS, EOS, the prompt's boundary and the cut at
max_length.

The prompt and every prompt + completion are tokenised apart. What is trained on is the whole text's
ids; the completion begins where they part from the prompt's ids, and the prompt shared by all sides
is the shortest such prefix. Everything works on batches, so that a fast tokenizer uses all cores.

Legend: m completions of one row.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.errors import FasttrError, one_line

Messages = list[dict[str, Any]]

# A tokenizer's encodings cost some hundred bytes a token, so one call is bounded by text, not by
# rows.
MAX_CHARACTERS_PER_CALL = 1_000_000

# Arguments of apply_chat_template that are not variables of the template: a data row may not set
# them.
RESERVED_TEMPLATE_KEYS = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
        "sanitize_control_tokens",
    }
)


class RowError(FasttrError):
    """A row that no rule covers, named by its position."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(f"row {row} (counted from 0): {message}")
        self.parts = (row, message)

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses from a tokenising process to this one
        return RowError, self.parts


class Example(NamedTuple):
    """One row as text, or as messages: the prompt and its m completions are all of one kind."""

    row: int  # position in the data set as read, named in errors
    prompt: str | Messages
    completions: tuple[str, ...] | tuple[Messages, ...]
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = {}


class Encoded(NamedTuple):
    """One row as token ids."""

    prompt_ids: np.ndarray  # (prompt_len,) int32
    completions: tuple[np.ndarray, ...]  # m arrays (completion_len,) int32
    mismatch: bool  # the prompt's own ids are not a prefix of every side
    truncated: bool = False


def require_eos(tokenizer: Any) -> None:
    """Raise FasttrError when the tokenizer has no EOS token: a completion could never learn to
    end."""
    if tokenizer.eos_token is None:
        raise FasttrError(
            f"{_name(tokenizer)} has no EOS token, and every completion must end with one: "
            "set eos_token in its tokenizer_config.json"
        )


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer knows."""
    return max(tokenizer.get_vocab().values()) + 1


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """The number of leading elements that two (n,) and (k,) arrays share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def split_at_boundary(prompt_ids: np.ndarray, whole_ids: Sequence[np.ndarray]) -> Encoded:
    """Split m tokenised prompt + completion texts where the first of them parts from the prompt's
    own ids."""
    boundary = min(common_prefix_length(prompt_ids, ids) for ids in whole_ids)
    completions = tuple(ids[boundary:] for ids in whole_ids)
    return Encoded(prompt_ids[:boundary], completions, mismatch=boundary < len(prompt_ids))


def cut(encoded: Encoded, max_length: int | None) -> Encoded:
    """Cut every side on the right to max_length tokens of prompt + completion; the prompt must be
    shorter than that."""
    if max_length is None:
        return encoded
    room = max_length - len(encoded.prompt_ids)
    assert room > 0, "a row whose prompt fills max_length is dropped before it is cut"
    truncated = any(len(ids) > room for ids in encoded.completions)
    return encoded._replace(
        completions=tuple(ids[:room] for ids in encoded.completions), truncated=truncated
    )


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool
) -> list[np.ndarray]:
    """Token ids of each text, int32: what `tokenizer(text)` gives, in calls of bounded size."""
    ids: list[np.ndarray] = []
    start, characters = 0, 0
    for end, text in enumerate(texts, 1):
        characters += len(text)
        if characters < MAX_CHARACTERS_PER_CALL and end < len(texts):
            continue
        batch = tokenizer(
            list(texts[start:end]),
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        ids.extend(np.asarray(row, dtype=np.int32) for row in batch)
        start, characters = end, 0
    return ids


def encode(tokenizer: Any, examples: Sequence[Example]) -> list[Encoded]:
    """Tokenise rows of text or of messages and split each at its boundary; nothing is cut yet.

    Text gets the tokenizer's own BOS, and its EOS as text unless a completion ends with it.
    Messages get what the chat template writes and nothing else; the prompt is rendered with the
    generation prompt. FasttrError without an EOS token, without a chat template for messages, and,
    naming the row, when the template refuses it.
    """
    require_eos(tokenizer)
    eos = tokenizer.eos_token
    texts: list[str] = []
    chats: list[Example] = []
    for example in examples:
        if isinstance(example.prompt, str):
            texts.append(example.prompt)
            for text in example.completions:
                assert isinstance(text, str)
                texts.append(example.prompt + (text if text.endswith(eos) else text + eos))
        else:
            chats.append(example)
    text_ids = iter(encode_texts(tokenizer, texts, add_special_tokens=True))
    chat_ids = iter(_encode_chats(tokenizer, chats))
    encoded = []
    for example in examples:
        ids = text_ids if isinstance(example.prompt, str) else chat_ids
        prompt_ids = next(ids)
        encoded.append(split_at_boundary(prompt_ids, [next(ids) for _ in example.completions]))
    return encoded


def _encode_chats(tokenizer: Any, examples: Sequence[Example]) -> list[np.ndarray]:
    """The ids of each example's prompt and of its sides, in order."""
    from transformers import PreTrainedTokenizerBase

    if not examples:
        return []
    if not tokenizer.chat_template:
        raise FasttrError(
            f"the rows hold messages, but {_name(tokenizer)} has no chat template: "
            "use an instruction-tuned model's tokenizer, or give rows of plain text"
        )
    # Rendering first and tokenising in batches equals tokenize=True unless a tokenizer has its own
    # way with templates.
    own_way = (
        getattr(type(tokenizer), "apply_chat_template", None)
        is not PreTrainedTokenizerBase.apply_chat_template
    )
    if not own_way and all(
        not example.template_kwargs and example.tools is None for example in examples
    ):
        try:
            prompts = tokenizer.apply_chat_template(
                [example.prompt for example in examples],
                tools=None,
                add_generation_prompt=True,
                tokenize=False,
            )
            sides = iter(
                tokenizer.apply_chat_template(
                    [
                        _whole(example, messages)
                        for example in examples
                        for messages in example.completions
                    ],
                    tools=None,
                    tokenize=False,
                )
            )
        except Exception:  # the loop below renders row by row and names the one at fault
            pass
        else:
            rendered = []
            for example, prompt in zip(examples, prompts, strict=True):
                rendered += [prompt, *(next(sides) for _ in example.completions)]
            return encode_texts(tokenizer, rendered, add_special_tokens=False)
    outputs: list[Any] = []
    for example in examples:
        options = {"tools": example.tools, **_checked_template_kwargs(example)}
        if own_way:
            options |= {"tokenize": True, "return_dict": True}
        else:
            options |= {"tokenize": False}
        try:
            outputs.append(
                tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, **options)
            )
            for messages in example.completions:
                outputs.append(tokenizer.apply_chat_template(_whole(example, messages), **options))
        except Exception as error:  # a template is a program: it raises whatever it likes
            told = f"{type(error).__name__}: {one_line(error)}"
            raise RowError(
                example.row, f"the chat template of {_name(tokenizer)} refuses the messages: {told}"
            ) from error
    if own_way:
        return [np.asarray(output["input_ids"], dtype=np.int32) for output in outputs]
    return encode_texts(tokenizer, outputs, add_special_tokens=False)


def _whole(example: Example, messages: str | Messages) -> Messages:
    assert isinstance(example.prompt, list)
    assert isinstance(messages, list)
    return example.prompt + messages


def _checked_template_kwargs(example: Example) -> Mapping[str, Any]:
    reserved = sorted(RESERVED_TEMPLATE_KEYS.intersection(example.template_kwargs))
    if reserved:
        told = (
            f"chat_template_kwargs holds {', '.join(reserved)}, which is no variable of a template"
        )
        raise RowError(example.row, f"{told}: remove it from the data")
    return example.template_kwargs


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of everything in a tokenizer that decides token ids: vocabulary, merges, special
    tokens, template.

    The same in every process; it does not depend on where the tokenizer was loaded from.
    """
    import transformers

    content: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "transformers": transformers.__version__,
        "special_tokens": {
            name: str(token) for name, token in tokenizer.special_tokens_map.items()
        },
        "chat_template": tokenizer.chat_template,
        "flags": [
            getattr(tokenizer, n, None)
            for n in ("add_bos_token", "add_eos_token", "split_special_tokens")
        ],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # These two are set anew by every call.
        content["backend"] = {
            key: value for key, value in state.items() if key not in ("padding", "truncation")
        }
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            content["files"] = {
                path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in files
            }
    return hashlib.blake2b(
        json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()


def _name(tokenizer: Any) -> str:
    return (
        f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "the tokenizer"
    )
