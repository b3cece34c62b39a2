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

NO_IDS = np.empty(0, dtype=np.int32)

# A tokenizer's encodings cost some hundred bytes a token, so one call is bounded by text, not by
# rows.
MAX_CHARACTERS_PER_CALL = 1_000_000

# Arguments of apply_chat_template that are not variables of the template: a data row may not set
# them.
RESERVED_TEMPLATE_KEYS = frozenset(
    {
        "conversation",
        "messages",
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

# Attributes of a tokenizer that decide ids.
_TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "split_special_tokens")


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
    prompt: str | Messages | None  # None: a completion is a whole conversation
    completions: tuple[str, ...] | tuple[Messages, ...]
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = {}


class Encoded(NamedTuple):
    """One row as token ids."""

    prompt_ids: np.ndarray  # (prompt_len,) int32
    completions: tuple[np.ndarray, ...]  # m arrays (completion_len,) int32
    mismatch: bool  # the prompt's own ids are not a prefix of every side
    truncated: bool = False
    # How many of the prompt's first tokens each completion goes without; None: all see all of it.
    prompt_skips: tuple[int, ...] | None = None


def require_eos(tokenizer: Any) -> None:
    """Raise FasttrError when the tokenizer has no EOS token: a completion could never learn to
    end."""
    if tokenizer.eos_token is None:
        raise FasttrError(
            f"{_name(tokenizer)} has no EOS token, and every completion must end with one: "
            "set eos_token in its tokenizer_config.json"
        )


def adjust(tokenizer: Any, *, chat_template: str | None, eos_token: str | None) -> None:
    """Give a tokenizer another chat template (text, or a .jinja file) or another EOS token."""
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise FasttrError(
                f"eos_token: got {eos_token!r}, which {_name(tokenizer)} does not know; wanted one "
                "of its tokens"
            )
        tokenizer.eos_token = eos_token
    if chat_template is None:
        return
    if chat_template.endswith((".jinja", ".j2")):
        try:
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FasttrError(f"chat_template: cannot read {chat_template!r}: {error}") from error
    if "{" not in chat_template:
        raise FasttrError(
            f"chat_template: got {chat_template!r:.60}, which writes no message; wanted a template "
            "as text, or a .jinja file"
        )
    tokenizer.chat_template = chat_template


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


def shorten(
    encoded: Encoded, max_prompt_length: int | None, max_completion_length: int | None
) -> Encoded:
    """The last tokens of the prompt and the first ones of every completion, as TRL had it from 0.12
    to 0.28; None leaves them whole."""
    prompt_ids = encoded.prompt_ids
    if max_prompt_length is not None:
        prompt_ids = prompt_ids[-max_prompt_length:]
    completions = tuple(ids[:max_completion_length] for ids in encoded.completions)
    return encoded._replace(prompt_ids=prompt_ids, completions=completions)


def cut(encoded: Encoded, max_length: int | None) -> Encoded:
    """Cut every side on the right to max_length tokens of prompt + completion; the prompt must be
    shorter than that."""
    if max_length is None:
        return encoded
    room = max_length - len(encoded.prompt_ids)
    assert room > 0, "a row whose prompt fills max_length is dropped before it is cut"
    truncated = any(len(ids) > room for ids in encoded.completions)
    completions = tuple(ids[:room] for ids in encoded.completions)
    return encoded._replace(completions=completions, truncated=truncated)


def cut_left(encoded: Encoded, max_length: int | None) -> Encoded:
    """Cut every side on the left to max_length tokens of prompt + completion (`keep_end`).

    Sides of unequal length lose unequal parts of the prompt, and share none of it then.
    """
    if max_length is None:
        return encoded
    prompt_length = len(encoded.prompt_ids)
    excess = [max(prompt_length + len(ids) - max_length, 0) for ids in encoded.completions]
    skips = [min(tokens, prompt_length) for tokens in excess]
    completions = [
        ids[tokens - skip :]
        for ids, tokens, skip in zip(encoded.completions, excess, skips, strict=True)
    ]
    unread = min(skips)
    return encoded._replace(
        prompt_ids=encoded.prompt_ids[unread:],
        completions=tuple(completions),
        truncated=any(excess),
        prompt_skips=tuple(skip - unread for skip in skips) if len(set(skips)) > 1 else None,
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
    texts = [text for example in examples for text in _texts(example, tokenizer.eos_token)]
    calls = [call for example in examples for call in _template_calls(example)]
    text_ids = iter(encode_texts(tokenizer, texts, add_special_tokens=True))
    chat_ids = iter(_encode_chats(tokenizer, calls))
    encoded = []
    for example in examples:
        ids = text_ids if isinstance(example.prompt, str) else chat_ids
        prompt_ids = NO_IDS if example.prompt is None else next(ids)
        whole_ids = [next(ids) for _ in example.completions]
        encoded.append(split_at_boundary(prompt_ids, whole_ids))
    return encoded


def _texts(example: Example, eos: str) -> list[str]:
    """What of a row of text is tokenised: its prompt, and its prompt with every completion."""
    if not isinstance(example.prompt, str):
        return []
    texts = [example.prompt]
    for completion in example.completions:
        assert isinstance(completion, str)
        end = "" if completion.endswith(eos) else eos
        texts.append(example.prompt + completion + end)
    return texts


class _TemplateCall(NamedTuple):
    """Messages that the chat template renders: a prompt, or a prompt with a completion."""

    row: int
    messages: Messages
    add_generation_prompt: bool
    options: Mapping[str, Any]  # what the row hands to the template


def _template_calls(example: Example) -> list[_TemplateCall]:
    if isinstance(example.prompt, str):
        return []
    options = {"tools": example.tools, **_checked_template_kwargs(example)}
    calls = []
    if example.prompt is not None:
        calls.append(_TemplateCall(example.row, example.prompt, True, options))
    for messages in example.completions:
        assert isinstance(messages, list)
        whole = [*(example.prompt or []), *messages]
        calls.append(_TemplateCall(example.row, whole, False, options))
    return calls


def _encode_chats(tokenizer: Any, calls: Sequence[_TemplateCall]) -> list[np.ndarray]:
    """Token ids of what the chat template writes at each call."""
    from transformers import PreTrainedTokenizerBase

    if not calls:
        return []
    if not tokenizer.chat_template:
        raise FasttrError(
            f"the rows hold messages, but {_name(tokenizer)} has no chat template: "
            "use an instruction-tuned model's tokenizer, or give rows of plain text"
        )
    method = getattr(type(tokenizer), "apply_chat_template", None)
    if method is not PreTrainedTokenizerBase.apply_chat_template:
        # It has its own way with templates, which may not be to render and then to tokenise.
        options = {"tokenize": True, "return_dict": True}
        outputs = [_rendered(tokenizer, call, options) for call in calls]
        return [np.asarray(output["input_ids"], dtype=np.int32) for output in outputs]
    # Rendering first and tokenising in batches gives the ids of tokenize=True, sooner.
    texts = _rendered_together(tokenizer, calls)
    if texts is None:
        texts = [_rendered(tokenizer, call, {"tokenize": False}) for call in calls]
    return encode_texts(tokenizer, texts, add_special_tokens=False)


def _rendered_together(tokenizer: Any, calls: Sequence[_TemplateCall]) -> list[str] | None:
    """All calls in two; None where rows have options of their own or the template refuses one."""
    if any(call.options != {"tools": None} for call in calls):
        return None
    texts = [""] * len(calls)
    for is_prompt in (True, False):
        places = [i for i, call in enumerate(calls) if call.add_generation_prompt == is_prompt]
        if not places:
            continue
        try:
            rendered = tokenizer.apply_chat_template(
                [calls[i].messages for i in places],
                tools=None,
                add_generation_prompt=is_prompt,
                tokenize=False,
            )
        except Exception:  # a template raises whatever it likes; alone, the row at fault is named
            return None
        for i, text in zip(places, rendered, strict=True):
            texts[i] = text
    return texts


def _rendered(tokenizer: Any, call: _TemplateCall, options: Mapping[str, Any]) -> Any:
    try:
        return tokenizer.apply_chat_template(
            call.messages,
            add_generation_prompt=call.add_generation_prompt,
            **call.options,
            **options,
        )
    except Exception as error:  # a template is a program: it raises whatever it likes
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RowError(
            call.row, f"the chat template of {_name(tokenizer)} refuses the messages: {reason}"
        ) from error


def _checked_template_kwargs(example: Example) -> Mapping[str, Any]:
    reserved = sorted(RESERVED_TEMPLATE_KEYS.intersection(example.template_kwargs))
    if reserved:
        reason = (
            f"chat_template_kwargs holds {', '.join(reserved)}, which is no variable of a template"
        )
        raise RowError(example.row, f"{reason}: remove it from the data")
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
        "flags": [getattr(tokenizer, name, None) for name in _TOKENIZER_FLAGS],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content["files"] = _saved_files(tokenizer)
    else:
        state = json.loads(backend.to_str())
        # Padding and truncation are set anew by every call.
        content["backend"] = {
            key: value for key, value in state.items() if key not in ("padding", "truncation")
        }
    described = json.dumps(content, sort_keys=True, default=str).encode()
    return hashlib.blake2b(described, digest_size=16).hexdigest()


def _saved_files(tokenizer: Any) -> dict[str, str]:
    """A digest of each file that a tokenizer without a backend of `tokenizers` is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}


def _name(tokenizer: Any) -> str:
    return (
        f"the tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "the tokenizer"
    )
