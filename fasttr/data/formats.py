"""Which columns make which format, and why a row may not be trained on.

Formats are TRL 1.16's; beyond it, by naming it or by its columns: raw HH transcripts, Alpaca's and
ShareGPT's columns, rows that are already tokenised.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fasttr.errors import FasttrError

DATASET_FORMATS = ("hh_rlhf",)

PAIR = ("chosen", "rejected")
PAIR_IDS = ("chosen_ids", "rejected_ids")
# Columns that say a prompt, the first that is there: TRL's, Alpaca's, ShareGPT's.
PROMPTS = (("prompt",), ("instruction", "input"), ("instruction",), ("conversations",))
COMPLETIONS = ("completion", "output")
CONVERSATIONS = ("messages", "conversations")
TEMPLATE = ("tools", "chat_template_kwargs")
# Columns of Alpaca's and ShareGPT's sets that belong to a prompt and are not read.
LEFT_OUT = ("history", "system")

_MEANINGS = {
    "label",
    "prompt_ids",
    "completion_ids",
    *PAIR,
    *PAIR_IDS,
    *COMPLETIONS,
    *CONVERSATIONS,
    *TEMPLATE,
    *(name for names in PROMPTS for name in names),
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
    NO_MESSAGES = 7
    TEMPLATE_ALIKE = 8

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
    Status.NO_MESSAGES: "a completion is an empty list of messages",
    Status.TEMPLATE_ALIKE: "the chat template prints the same for both sides, whose messages "
    "differ: it may not print content that is a list of parts, or thoughts",
}


@dataclass(frozen=True)
class RowFormat:
    """How the columns of a data set are read."""

    name: str  # "paired", "unpaired", "messages", "hh_rlhf", "paired_ids", "unpaired_ids"
    columns: tuple[str, ...]  # every column that is read
    completions: tuple[str, ...]  # the columns of the m completions
    prompt: tuple[str, ...] = ()  # the columns of the prompt; none: the completions hold it
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
    """Choose the format by the columns, or by `dataset_format`.

    `sides`: 1 when only completions are wanted, without a label. FasttrError says which columns are
    there and wanted.
    """
    got = set(columns)
    _refuse_pictures(got)
    _check_weight_column(weight_column, columns)
    extra = () if weight_column is None else (weight_column,)
    if dataset_format is not None:
        return _named_format(dataset_format, columns, extra)
    for find in (_paired_ids, _unpaired_ids, _paired, _unpaired, _messages):
        found = find(got, extra, sides)
        if found is not None:
            return found
    raise FasttrError(_unknown_columns(columns, sides))


def _refuse_pictures(got: set[str]) -> None:
    pictures = sorted(got & {"image", "images"})
    if pictures:
        raise FasttrError(
            f"the data set has a column {pictures[0]!r}: fasttr trains on text alone; remove the "
            "column, or use TRL for vision-language models"
        )


def _check_weight_column(weight_column: str | None, columns: Sequence[str]) -> None:
    if weight_column is None:
        return
    if weight_column not in columns:
        raise FasttrError(
            f"weight_column {weight_column!r} is not among the columns {quoted(columns)}"
        )
    if weight_column in _MEANINGS:
        raise FasttrError(
            f"weight_column {weight_column!r} is a column of the rows' own content; wanted numbers"
        )


def _named_format(name: str, columns: Sequence[str], extra: tuple[str, ...]) -> RowFormat:
    if name not in DATASET_FORMATS:
        raise FasttrError(
            f"dataset_format {name!r} is unknown: use one of {quoted(DATASET_FORMATS)}, or leave "
            "it out"
        )
    if not set(PAIR) <= set(columns):
        raise FasttrError(
            "dataset_format hh_rlhf reads the columns 'chosen', 'rejected'; the data set has "
            f"{quoted(columns)}"
        )
    return RowFormat(name, (*PAIR, *extra), PAIR)


def _paired_ids(got: set[str], extra: tuple[str, ...], sides: int) -> RowFormat | None:
    if not got.issuperset(("prompt_ids", *PAIR_IDS)):
        return None
    return RowFormat("paired_ids", ("prompt_ids", *PAIR_IDS, *extra), PAIR_IDS, ("prompt_ids",))


def _unpaired_ids(got: set[str], extra: tuple[str, ...], sides: int) -> RowFormat | None:
    label = _present(got, "label")
    if not got.issuperset(("prompt_ids", "completion_ids")) or not (label or sides == 1):
        return None
    used = ("prompt_ids", "completion_ids", *label, *extra)
    return RowFormat("unpaired_ids", used, ("completion_ids",), ("prompt_ids",), bool(label))


def _paired(got: set[str], extra: tuple[str, ...], sides: int) -> RowFormat | None:
    if not got.issuperset(PAIR):
        return None
    prompt = _prompt_columns(got)
    used = (*prompt, *PAIR, *_present(got, *TEMPLATE), *extra)
    return RowFormat("paired", used, PAIR, prompt)


def _unpaired(got: set[str], extra: tuple[str, ...], sides: int) -> RowFormat | None:
    prompt = _prompt_columns(got)
    completion = _present(got, *COMPLETIONS)[:1]
    label = _present(got, "label")
    if not prompt or not completion or not (label or sides == 1):
        return None
    used = (*prompt, *completion, *label, *_present(got, *TEMPLATE), *extra)
    return RowFormat("unpaired", used, completion, prompt, bool(label))


def _messages(got: set[str], extra: tuple[str, ...], sides: int) -> RowFormat | None:
    whole = _present(got, *CONVERSATIONS)[:1]
    if not whole or sides != 1:
        return None
    return RowFormat("messages", (*whole, *_present(got, *TEMPLATE), *extra), whole)


def _prompt_columns(got: set[str]) -> tuple[str, ...]:
    return next((names for names in PROMPTS if got.issuperset(names)), ())


def _present(got: set[str], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in got)


def _unknown_columns(columns: Sequence[str], sides: int) -> str:
    got = set(columns)
    there = f"the data set has the columns {quoted(columns)}"
    has_prompt = bool(_prompt_columns(got)) and bool(_present(got, *COMPLETIONS))
    if has_prompt or got.issuperset(("prompt_ids", "completion_ids")):
        return (
            f"{there}, and a completion alone needs a 'label' (true or false) too: add it, or give "
            "'chosen' and 'rejected'; for completions without a verdict there is fasttr sft"
        )
    if sides == 1 and "text" in got:
        return (
            f"{there}; rows of whole 'text' are not trained on: wanted 'prompt' and 'completion', "
            "or 'messages'"
        )
    return (
        f"{there}; wanted 'chosen', 'rejected' (and 'prompt' unless they share it), or 'prompt', "
        "'completion', 'label', or the same as token ids: rename or add columns, or say which is "
        f"which, such as {_suggested_columns(columns)}"
    )


def _suggested_columns(columns: Sequence[str]) -> str:
    """`columns: {...}` for names that differ by their case alone, else an example."""
    spelled = {name.lower(): name for name in columns if name.lower() != name}
    found = {name: spelled[name] for name in ("prompt", *PAIR) if name in spelled}
    found = found or {"chosen": "good", "rejected": "bad"}
    inner = ", ".join(f"{ours}: {theirs}" for ours, theirs in found.items())
    return f"columns: {{{inner}}}"


def quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
