"""A setting is written once: its default, its range, its sentence, its group.

The check of a configuration, `--help`, and the tables of REFERENCE.md all read these lines.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fasttr.errors import all_of, did_you_mean


class Range(NamedTuple):
    """Which values are in it, and the words for them."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


class Setting(NamedTuple):
    """One field of a configuration."""

    name: str
    type: Any
    default: Any
    range: Range | None
    help: str
    group: str
    may_change: bool  # on resume: it does not touch what is computed
    in_eval: bool  # `fasttr eval` reads it

    @property
    def is_optional(self) -> bool:
        return type(None) in typing.get_args(self.type)

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def sentence(self) -> str:
        """Its help with its range, as a reader sees it."""
        return self.help if self.range is None else f"{self.help}; {self.range.words}"


def setting(
    default: Any,
    range: Range | None,
    help: str,
    *,
    may_change: bool = False,
    in_eval: bool = False,
) -> Any:
    """A field of a configuration; see `Setting`. A default of REQUIRED means that there is none."""
    told = {
        "range": range,
        "help": help,
        "may_change": may_change,
        "in_eval": in_eval,
    }
    return dataclasses.field(default=default, metadata=told)


REQUIRED = dataclasses.MISSING


def settings_of(config_class: type) -> dict[str, Setting]:
    """The settings of a configuration by name, in the order in which they stand.

    The group of a setting is the title of the class that it is written in.
    """
    types = typing.get_type_hints(config_class)
    titles = {}
    for written_in in reversed(config_class.__mro__):
        title = (written_in.__doc__ or "").split(".")[0]
        titles.update(dict.fromkeys(inspect.get_annotations(written_in), title))
    found = {}
    for field in dataclasses.fields(config_class):
        told = {"group": titles[field.name], **field.metadata}
        found[field.name] = Setting(field.name, types[field.name], field.default, **told)
    return found


def check_ranges(config: Any) -> None:
    """Raise FasttrError (got, wanted) for the values that are out of their range."""
    check_values(settings_of(type(config)).values(), vars(config))


def check_values(settings: Iterable[Setting], values: Mapping[str, Any]) -> None:
    """The same of a mapping that has them all."""
    found = [out_of_range(one, values[one.name]) for one in settings]
    reasons = [reason for reason in found if reason is not None]
    if reasons:
        raise all_of(reasons)


def out_of_range(one: Setting, value: Any) -> str | None:
    """Why a value of a setting's type is refused (got, wanted); None where it is not."""
    if value is None and one.is_optional:
        return None
    if one.range is not None and not _holds(one.range, value):
        near = did_you_mean(value, one.range.choices) if isinstance(value, str) else ""
        return f"{one.name}: got {value!r:.60}; wanted {one.range.words}{near}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{one.name}: got {value!r}; wanted a finite number"
    return None


def described(config_class: type) -> str:
    """A docstring that lists the settings of a configuration under their groups."""
    lines = [config_class.__doc__ or "", ""]
    group = None
    for one in settings_of(config_class).values():
        if one.group != group:
            group = one.group
            lines += ["", f"{group}:"]
        lines.append(f"    {one.name}: {one.sentence} (default {one.default!r})")
    return "\n".join(lines)


def above(low: float) -> Range:
    return Range(f"a number above {low:g}", lambda x: x > low)


def at_least(low: float) -> Range:
    return Range(f"a number from {low:g}", lambda x: x >= low)


def between(low: float, high: float) -> Range:
    return Range(f"a number from {low:g} to {high:g}", lambda x: low <= x <= high)


def from_to_below(low: float, high: float) -> Range:
    return Range(f"a number from {low:g} to below {high:g}", lambda x: low <= x < high)


def whole(low: int) -> Range:
    return Range(f"a whole number from {low}", lambda x: x >= low)


def one_of(*choices: str) -> Range:
    return Range(f"one of {', '.join(choices)}", lambda x: x in choices, choices)


SEED = Range("a whole number from 0 to below 2^32", lambda x: 0 <= x < 2**32)
INTERVAL = Range(
    "a whole number from 1, or a share of all steps above 0 and below 1",
    lambda x: 0 < x < 1 or (x >= 1 and float(x).is_integer()),
)
ROWS_OR_SHARE = Range(
    "a share between 0 and 1, or a whole number of rows",
    lambda x: 0 < x < 1 or (x >= 1 and float(x).is_integer()),
)


def _holds(range: Range, value: Any) -> bool:
    try:
        return bool(range.holds(value))
    except TypeError:  # a value of another type than the comparison is for
        return False
