"""One key of TRL, and what may become of it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Kind = Literal["honoured", "renamed", "ignored", "refused"]


class Key(NamedTuple):
    """One key. A value equal to `default` is accepted silently, whatever the kind."""

    name: str
    default: Any
    # int, float, bool, str, names, floats, dict, strategy, any; with ? where none is a value
    type: str
    kind: Kind
    note: str = ""  # honoured: what is special; renamed: how; ignored: why; refused: advice
    ours: str = ""  # the key it is renamed to
    plainly: bool = False  # renamed, with the same values


def honoured(name: str, default: Any, type_: str, note: str = "") -> Key:
    """A key that keeps its name and its meaning."""
    return Key(name, default, type_, "honoured", note)


def renamed(name: str, default: Any, type_: str, ours: str, note: str = "") -> Key:
    """A key whose meaning has another name here, `ours`."""
    return Key(name, default, type_, "renamed", note, ours)


def same(name: str, default: Any, type_: str, ours: str, note: str = "") -> Key:
    """A renamed key with the same values."""
    return Key(name, default, type_, "renamed", note, ours, plainly=True)


def ignored(name: str, default: Any, type_: str, reason: str) -> Key:
    """A key that changes no value."""
    return Key(name, default, type_, "ignored", reason)


def refused(name: str, default: Any, type_: str, advice: str) -> Key:
    """A key that a run cannot keep to: any value but the default stops it."""
    return Key(name, default, type_, "refused", advice)
