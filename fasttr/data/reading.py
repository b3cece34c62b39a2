"""Rows of a data set to examples: what a prompt is, and what cannot be trained on.

Rules are TRL 1.16's; beyond it, a text prompt beside message completions and messages under
ShareGPT's keys are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fasttr.data.formats import RowFormat, Skipped, Status
from fasttr.data.tokens import Encoded, Example, Messages, RowError

HH_TURN = "\n\nAssistant:"
HH_START = "\n\nHuman:"
# Roles of ShareGPT's messages; others keep their name.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Roles that templates know: one may pass over a message of another role.
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython", "environment"}


def read_batch(
    batch: Mapping[str, list[Any]], rows: Sequence[int], row_format: RowFormat
) -> list[Example | Skipped]:
    """Examples of text or messages for a batch of rows; `rows` are their positions. RowError on a
    wrong type."""
    read = _READERS[row_format.name]
    examples = []
    for place, row in enumerate(rows):
        values = {name: batch[name][place] for name in row_format.columns}
        examples.append(read(row, values, row_format))
    return examples


def read_ids_batch(
    batch: Mapping[str, list[Any]], rows: Sequence[int], row_format: RowFormat, vocabulary_size: int
) -> list[Encoded]:
    """Rows that are already tokenised. RowError on anything but ids of the tokenizer's
    vocabulary."""
    encoded = []
    for place, row in enumerate(rows):
        prompt_ids, *completions = (
            _ids(row, name, batch[name][place], vocabulary_size)
            for name in (*row_format.prompt, *row_format.completions)
        )
        encoded.append(Encoded(prompt_ids, tuple(completions), mismatch=False))
    return encoded


def read_weights(
    batch: Mapping[str, list[Any]], rows: Sequence[int], weight_column: str | None
) -> np.ndarray:
    """(n,) float32 weights, 1 without a column; null becomes NaN, which drops the row. RowError on
    a non-number."""
    if weight_column is None:
        return np.ones(len(rows), dtype=np.float32)
    values = batch[weight_column]
    for row, value in zip(rows, values, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RowError(row, f"{weight_column} is {_kind(value)}; wanted a number")
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)


def read_labels(batch: Mapping[str, list[Any]], rows: Sequence[int]) -> np.ndarray:
    """(n,) bool labels from booleans, or the numbers 0 and 1. RowError on anything else."""
    for row, value in zip(rows, batch["label"], strict=True):
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            quoted = ", not as text" if str(value).lower() in ("true", "false") else ""
            raise RowError(row, f"label is {value!r:.40}; wanted true or false{quoted}")
    return np.array(batch["label"], dtype=bool)


def read_prompt(row: int, value: Any) -> str | Messages:
    """A prompt by itself, text or messages. RowError on anything else."""
    if value is None:
        raise RowError(row, "prompt is null; wanted text or a list of messages")
    prompt = _text_or_messages(row, "prompt", value)
    if isinstance(prompt, list) and not prompt:
        raise RowError(row, "prompt is an empty list; wanted at least one message")
    return prompt


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, tuple[Any, Any]]:
    """The common start of two texts (characters) or conversations (turns) is the prompt.

    When one side is a start of the other, the last common element stays in the completions. A text
    prompt does not end with the space before the first difference. (TRL looks behind the start of a
    text that differs at once and ends with a space, and takes nearly all of it for the prompt; here
    that prompt is empty.)
    """
    length = _common_start(chosen, rejected)
    if length == min(len(chosen), len(rejected)):
        length = max(length - 1, 0)
    elif isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length], (chosen[length:], rejected[length:])


def unknown_role(example: Example) -> str | None:
    """The first role in a row of messages that templates may pass over, or None."""
    if isinstance(example.prompt, str):
        return None
    conversations = (example.prompt or [], *example.completions)
    roles = [str(message["role"]) for messages in conversations for message in messages]  # type: ignore[index]
    return next((role for role in roles if role not in ROLES), None)


def looks_like_hh(values: Mapping[str, Any]) -> bool:
    """Whether a row without a prompt is a pair of raw HH transcripts."""
    sides = [values.get(name) for name in ("chosen", "rejected")]
    return all(
        isinstance(side, str) and side.startswith(HH_START) and HH_TURN in side for side in sides
    )


def _read_row(row: int, values: Mapping[str, Any], row_format: RowFormat) -> Example | Skipped:
    names = row_format.completions
    sides: tuple[Any, ...] = tuple(_text_or_messages(row, name, values[name]) for name in names)
    if len({type(side) for side in sides}) > 1:
        raise RowError(
            row, "chosen and rejected are of different types; wanted both text or both messages"
        )
    if any(side == [] for side in sides):
        return Skipped(Status.NO_MESSAGES)
    prompt, sides = _parted(row, _prompt(row, values, row_format), sides)
    if isinstance(prompt, str):
        return Example(row, prompt, sides)
    if not prompt:
        raise RowError(
            row, "the prompt has no messages (do chosen and rejected begin with the same turn?)"
        )
    return _chat(row, prompt, sides, values)


def _read_transcripts(
    row: int, values: Mapping[str, Any], row_format: RowFormat
) -> Example | Skipped:
    prompts, completions = [], []
    for name in row_format.completions:
        text = values[name]
        if not isinstance(text, str):
            raise RowError(
                row, f"{name} is {_kind(text)}; dataset_format hh_rlhf wants a transcript as text"
            )
        before, turn, completion = text.rpartition(HH_TURN)
        if not turn:
            return Skipped(Status.NO_ASSISTANT_TURN)
        prompts.append(before + turn)
        completions.append(completion)
    if len(set(prompts)) > 1:
        return Skipped(Status.PROMPTS_DIFFER)
    return Example(row, prompts[0], tuple(completions))


def _read_conversation(
    row: int, values: Mapping[str, Any], row_format: RowFormat
) -> Example | Skipped:
    """All of a conversation is the completion, as in TRL's SFT."""
    (name,) = row_format.completions
    messages = _text_or_messages(row, name, values[name])
    if isinstance(messages, str):
        raise RowError(row, f"{name} is text; wanted a list of messages with 'role' and 'content'")
    if not messages:
        return Skipped(Status.NO_MESSAGES)
    return _chat(row, None, (messages,), values)


_READERS = {
    "paired": _read_row,
    "unpaired": _read_row,
    "hh_rlhf": _read_transcripts,
    "messages": _read_conversation,
}


def _chat(
    row: int,
    prompt: Messages | None,
    sides: tuple[Messages, ...],
    values: Mapping[str, Any],
) -> Example:
    kwargs = values.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise RowError(row, f"chat_template_kwargs is {_kind(kwargs)}; wanted a mapping")
    return Example(row, prompt, sides, _tools(row, values.get("tools")), kwargs or {})


def _prompt(row: int, values: Mapping[str, Any], row_format: RowFormat) -> str | Messages | None:
    """The prompt that a row names; None where its completions hold it."""
    if not row_format.prompt:
        return None
    if row_format.prompt[0] != "instruction":
        return read_prompt(row, values[row_format.prompt[0]])
    parts = [values[name] for name in row_format.prompt]
    for name, part in zip(row_format.prompt, parts, strict=True):
        if not isinstance(part, str) and not (name == "input" and part is None):
            raise RowError(row, f"{name} is {_kind(part)}; wanted text")
    return "\n".join(part for part in parts if part)


def _parted(
    row: int, prompt: str | Messages | None, sides: tuple[Any, ...]
) -> tuple[str | Messages, tuple[Any, ...]]:
    """Prompt and completions of one kind."""
    if prompt is None:
        return extract_prompt(*sides)
    if isinstance(prompt, str) and isinstance(sides[0], list):
        return _prompt_from_messages(prompt, sides)
    if isinstance(prompt, list) and isinstance(sides[0], str):
        raise RowError(
            row, "prompt is a list of messages but the completion is text; make it messages too"
        )
    return prompt, sides


def _prompt_from_messages(
    prompt: str, sides: tuple[Messages, ...]
) -> tuple[Messages, tuple[Messages, ...]]:
    """A text prompt with message completions: they repeat the prompt as their first turns, or
    begin by answering."""
    if all(side[0]["role"] == "assistant" for side in sides):
        return [{"role": "user", "content": prompt}], sides
    if len(sides) == 1:
        return sides[0][:-1], (sides[0][-1:],)
    return extract_prompt(*sides)


def _common_start(a: Any, b: Any) -> int:
    # Bisection on slices: they are compared in C, single characters would be in Python.
    low = 0
    high = min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _text_or_messages(row: int, name: str, value: Any) -> str | Messages:
    """Text as it is, messages under TRL's keys; RowError on anything else."""
    if isinstance(value, str):
        return value
    if _is_sharegpt(value):
        value = [value]
    if not isinstance(value, list):
        raise RowError(
            row,
            f"{name} is {_kind(value)}; wanted text or a list of messages with 'role' and "
            "'content'",
        )
    return [_message(row, name, item) for item in value]


def _message(row: int, name: str, item: Any) -> dict[str, Any]:
    if _is_sharegpt(item):
        role = item["from"]
        item = {"role": SHAREGPT_ROLES.get(role, role), "content": item["value"]}
    if not isinstance(item, Mapping) or item.get("role") is None:
        raise RowError(
            row, f"{name} is a list with {item!r:.60}; wanted messages with 'role' and 'content'"
        )
    content = item.get("content")
    parts = content if isinstance(content, list) else []
    if any(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts):
        raise RowError(row, f"{name} holds content that is not text: fasttr trains on text alone")
    return item  # type: ignore[return-value]


def _is_sharegpt(item: Any) -> bool:
    return isinstance(item, Mapping) and item.get("role") is None and {"from", "value"} <= set(item)


def _tools(row: int, value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(
                row, f"tools is text that is not JSON ({error}); wanted a list of JSON schemas"
            ) from None
    if value is not None and not isinstance(value, list):
        raise RowError(
            row,
            f"tools is {_kind(value)}; wanted a list of JSON schemas, or that list as JSON text",
        )
    return value


def _ids(row: int, name: str, value: Any, vocabulary_size: int) -> np.ndarray:
    if not isinstance(value, list) or not all(_is_whole(item) for item in value):
        raise RowError(row, f"{name} is {_kind(value)}; wanted a list of token ids")
    if value and not 0 <= min(value) <= max(value) < vocabulary_size:
        raise RowError(
            row, f"{name} holds ids outside [0, {vocabulary_size}), the tokenizer's vocabulary"
        )
    return np.array(value, dtype=np.int32)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return {"str": "text", "dict": "a mapping"}.get(type(value).__name__, repr(value)[:40])
