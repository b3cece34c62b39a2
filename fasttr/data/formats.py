"""Rows of a data set to examples: which columns make which format, what a prompt is, and what
cannot be trained on.

Formats and rules are TRL 1.16's; beyond it, by naming it or by its columns: raw HH transcripts, a
string prompt with message completions, rows that are already tokenised.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fasttr.data.tokens import Encoded, Example, Messages, RowError
from fasttr.errors import FasttrError

HH_TURN = "\n\nAssistant:"
DATASET_FORMATS = ("hh_rlhf",)


_MEANINGS = {
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "tools",
    "chat_template_kwargs",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "completion_ids",
}


class Status(enum.IntEnum):
    """Why a row is not trained on; KEPT means that it is."""

    KEPT = 0
    PROMPT_TOO_LONG = 1
    IDENTICAL_SIDES = 2
    WEIGHT_NOT_FINITE = 3
    PROMPTS_DIFFER = 4
    NO_ASSISTANT_TURN = 5
    EMPTY_COMPLETION = 6

    @property
    def reason(self) -> str:
        return _REASONS[self]


_REASONS = {
    Status.KEPT: "kept",
    Status.PROMPT_TOO_LONG: "the prompt alone fills max_length",
    Status.IDENTICAL_SIDES: "chosen is identical to rejected",
    Status.WEIGHT_NOT_FINITE: "the weight is not finite",
    Status.PROMPTS_DIFFER: "chosen and rejected have different prompts",
    Status.NO_ASSISTANT_TURN: "no '\\n\\nAssistant:' in the transcript",
    Status.EMPTY_COMPLETION: "a completion has no tokens",
}


@dataclass(frozen=True)
class RowFormat:
    """How the columns of a data set are read."""

    name: str  # "paired", "unpaired", "hh_rlhf", "paired_ids", "unpaired_ids"
    columns: tuple[str, ...]  # every column that is read
    completions: tuple[str, ...]  # the columns of the m completions
    has_prompt: bool = True
    has_label: bool = False

    @property
    def is_tokenised(self) -> bool:
        return self.name.endswith("_ids")


class Skipped(NamedTuple):
    """A row that is dropped before it is tokenised."""

    status: Status


def find_format(
    columns: Sequence[str],
    *,
    dataset_format: str | None = None,
    weight_column: str | None = None,
    sides: int = 2,
) -> RowFormat:
    """Choose the format by the columns, or by `dataset_format`. FasttrError says which columns are
    there and wanted."""
    got = set(columns)
    if got & {"image", "images"}:
        raise FasttrError(
            f"the data set has a column {sorted(got & {'image', 'images'})[0]!r}: fasttr trains on "
            "text alone; "
            "remove the column, or use TRL for vision-language models"
        )
    if weight_column is not None and weight_column not in got:
        raise FasttrError(
            f"weight_column {weight_column!r} is not among the columns {_quoted(columns)}"
        )
    if weight_column in _MEANINGS:
        raise FasttrError(
            f"weight_column {weight_column!r} is a column of the rows' own content; wanted numbers"
        )
    extra = (weight_column,) if weight_column is not None else ()
    if dataset_format is not None:
        if dataset_format not in DATASET_FORMATS:
            raise FasttrError(
                f"dataset_format {dataset_format!r} is unknown: use one of "
                f"{_quoted(DATASET_FORMATS)}, or leave it out"
            )
        if not {"chosen", "rejected"} <= got:
            raise FasttrError(
                "dataset_format hh_rlhf reads the columns 'chosen', 'rejected'; the data set has "
                f"{_quoted(columns)}"
            )
        return RowFormat(
            "hh_rlhf", ("chosen", "rejected", *extra), ("chosen", "rejected"), has_prompt=False
        )

    template = tuple(name for name in ("tools", "chat_template_kwargs") if name in got)
    label = ("label",) if "label" in got else ()
    pair, pair_ids = ("chosen", "rejected"), ("chosen_ids", "rejected_ids")
    if got.issuperset(("prompt_ids", *pair_ids)):
        return RowFormat("paired_ids", ("prompt_ids", *pair_ids, *extra), pair_ids)
    if got.issuperset(("prompt_ids", "completion_ids")) and (label or sides == 1):
        used = ("prompt_ids", "completion_ids", *label, *extra)
        return RowFormat("unpaired_ids", used, ("completion_ids",), has_label=bool(label))
    if got.issuperset(pair):
        prompt = ("prompt",) if "prompt" in got else ()
        return RowFormat(
            "paired", (*prompt, *pair, *template, *extra), pair, has_prompt=bool(prompt)
        )
    if got.issuperset(("prompt", "completion")) and (label or sides == 1):
        used = ("prompt", "completion", *label, *template, *extra)
        return RowFormat("unpaired", used, ("completion",), has_label=bool(label))
    if got.issuperset(("prompt", "completion")) or got.issuperset(("prompt_ids", "completion_ids")):
        raise FasttrError(
            f"the data set has the columns {_quoted(columns)}, and a completion alone needs a "
            "'label' (true or false) "
            "too: add it, or give 'chosen' and 'rejected'"
        )
    raise FasttrError(
        f"the data set has the columns {_quoted(columns)}; wanted 'chosen', 'rejected' (and "
        "'prompt' unless they share "
        "it), or 'prompt', 'completion', 'label', or the same as token ids: rename or add columns"
    )


def read_batch(
    batch: Mapping[str, list[Any]], rows: Sequence[int], row_format: RowFormat
) -> list[Example | Skipped]:
    """Examples of text or messages for a batch of rows; `rows` are their positions. RowError on a
    wrong type."""
    examples: list[Example | Skipped] = []
    for i, row in enumerate(rows):
        sides = tuple(batch[name][i] for name in row_format.completions)
        if row_format.name == "hh_rlhf":
            examples.append(_split_transcripts(row, sides))
            continue
        prompt = batch["prompt"][i] if row_format.has_prompt else None
        if row_format.has_prompt and prompt is None:
            raise RowError(row, "prompt is null; wanted text or a list of messages")
        are_messages = [
            _is_messages(row, name, side)
            for name, side in zip(row_format.completions, sides, strict=True)
        ]
        if len(set(are_messages)) > 1:
            raise RowError(
                row, "chosen and rejected are of different types; wanted both text or both messages"
            )
        if prompt is not None and _is_messages(row, "prompt", prompt) != are_messages[0]:
            if not are_messages[0]:
                raise RowError(
                    row,
                    "prompt is a list of messages but the completion is text; make it messages too",
                )
            prompt, sides = _prompt_from_messages(prompt, sides)
        elif prompt is None:
            prompt, sides = extract_prompt(*sides)
        if are_messages[0] and not prompt:
            raise RowError(
                row, "the prompt has no messages (do chosen and rejected begin with the same turn?)"
            )
        tools = kwargs = None
        if are_messages[0]:
            tools = _tools(row, batch["tools"][i]) if "tools" in batch else None
            kwargs = batch["chat_template_kwargs"][i] if "chat_template_kwargs" in batch else None
            if kwargs is not None and not isinstance(kwargs, Mapping):
                raise RowError(row, f"chat_template_kwargs is {_kind(kwargs)}; wanted a mapping")
        examples.append(Example(row, prompt, sides, tools, kwargs or {}))
    return examples


def read_ids_batch(
    batch: Mapping[str, list[Any]], rows: Sequence[int], row_format: RowFormat, vocabulary_size: int
) -> list[Encoded]:
    """Rows that are already tokenised. RowError on anything but ids of the tokenizer's
    vocabulary."""
    columns = [(name, batch[name]) for name in ("prompt_ids", *row_format.completions)]
    encoded = []
    for i, row in enumerate(rows):
        prompt_ids, *completions = (
            _ids(row, name, column[i], vocabulary_size) for name, column in columns
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
    with np.errstate(over="ignore"):
        return np.array([np.nan if value is None else float(value) for value in values]).astype(
            np.float32
        )


def read_labels(batch: Mapping[str, list[Any]], rows: Sequence[int]) -> np.ndarray:
    """(n,) bool labels from booleans, or the integers 0 and 1. RowError on anything else."""
    for row, value in zip(rows, batch["label"], strict=True):
        if not isinstance(value, bool | int) or value not in (0, 1):
            raise RowError(row, f"label is {value!r:.40}; wanted true or false")
    return np.array(batch["label"], dtype=bool)


def read_prompt(row: int, value: Any) -> str | Messages:
    """A prompt by itself, text or messages. RowError on anything else."""
    if value is None:
        raise RowError(row, "prompt is null; wanted text or a list of messages")
    _is_messages(row, "prompt", value)
    return value


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


def _common_start(a: Any, b: Any) -> int:
    low, high = 0, min(len(a), len(b))
    while (
        low < high
    ):  # bisection on slices: comparing slices runs in C, comparing characters in Python would not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split_transcripts(row: int, sides: tuple[Any, ...]) -> Example | Skipped:
    prompts, completions = [], []
    for name, text in zip(("chosen", "rejected"), sides, strict=True):
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


def _prompt_from_messages(
    prompt: str, sides: tuple[Messages, ...]
) -> tuple[Messages, tuple[Messages, ...]]:
    """A string prompt with message completions: they repeat the prompt as their first turns, or
    begin by answering."""
    if all(side[0]["role"] == "assistant" for side in sides):
        return [{"role": "user", "content": prompt}], sides
    if len(sides) == 1:
        return sides[0][:-1], (sides[0][-1:],)
    return extract_prompt(*sides)


def _is_messages(row: int, name: str, value: Any) -> bool:
    """False for text, True for a non-empty list of messages; RowError otherwise."""
    if isinstance(value, str):
        return False
    if not isinstance(value, list):
        raise RowError(
            row,
            f"{name} is {_kind(value)}; wanted text or a list of messages with 'role' and "
            "'content'",
        )
    if not value:
        raise RowError(row, f"{name} is an empty list; wanted at least one message")
    for item in value:
        if not isinstance(item, Mapping) or item.get("role") is None:
            raise RowError(
                row,
                f"{name} is a list with {item!r:.60}; wanted messages with 'role' and 'content'",
            )
    for message in value:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in parts):
            raise RowError(
                row, f"{name} holds content that is not text: fasttr trains on text alone"
            )
    return True


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
    if not isinstance(value, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) for i in value
    ):
        raise RowError(row, f"{name} is {_kind(value)}; wanted a list of token ids")
    if value and not 0 <= min(value) <= max(value) < vocabulary_size:
        raise RowError(
            row, f"{name} holds ids outside [0, {vocabulary_size}), the tokenizer's vocabulary"
        )
    return np.array(value, dtype=np.int32)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {type(value[0]).__name__}" if value else "an empty list"
    return (
        "null"
        if value is None
        else {"str": "text", "dict": "a mapping"}.get(type(value).__name__, repr(value)[:40])
    )


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
