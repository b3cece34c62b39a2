"""Values as TRL's parser reads them, from YAML or from words of a command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fasttr.config.trl_key import Key
from fasttr.config.trl_table import ACCELERATOR
from fasttr.errors import FasttrError
from fasttr.settings import Setting

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")
_WANTED = {"names": "a list", "floats": "a list of float", "dict": "a mapping"}


def is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("none", "null")


def read_as(one: Setting, value: Any) -> Any:
    """A value of a setting, None for the word where the setting may be left out: to others, as
    scale_rewards, it is a word."""
    return None if one.is_optional and is_none(value) else value


def is_default(key: Key, value: Any) -> bool:
    """Whether a value is the one that TRL has anyway: such a key changes nothing."""
    if isinstance(key.default, list) and not isinstance(value, list):
        value = [value]
    if key.type == "any" and key.default is None and value in (None, False, "", [], {}):
        return True
    if key.name == "accelerator_config" and isinstance(value, Mapping):
        return all(name in ACCELERATOR and ACCELERATOR[name] == v for name, v in value.items())
    return value == key.default and isinstance(value, bool) == isinstance(key.default, bool)


def converted(key: Key, value: Any) -> Any:
    """A value in the type of its key. FasttrError when it cannot be."""
    kind, optional = key.type.removesuffix("?"), key.type.endswith("?")
    if value is None or (optional and is_none(value)):
        return None
    try:
        return _READERS.get(kind, _as_is)(value)
    except (ValueError, TypeError, OverflowError):
        wanted = _WANTED.get(kind, kind) + (" or none" if optional else "")
        raise FasttrError(f"{key.name}: got {value}; wanted {wanted}") from None


def named_columns(words: str | list[Any]) -> Any:
    """`chosen=good rejected=bad` of a command line as a mapping, or one that is written as in a
    file."""
    if isinstance(words, str) and words.startswith("{"):
        return _mapping(words)
    pairs = [
        str(word).partition("=") for word in (words.split() if isinstance(words, str) else words)
    ]
    if not all(name and equals and value for name, equals, value in pairs):
        raise _wrong_columns(words)
    return {name: value for name, _, value in pairs}


def _mapping(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _wrong_columns(text) from error


def _wrong_columns(words: Any) -> FasttrError:
    return FasttrError(
        f"columns: got {words!r:.60}; wanted such as chosen=good rejected=bad, or in a file a "
        "mapping"
    )


def _as_is(value: Any) -> Any:
    return value


def _bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in TRUE + FALSE:
        raise ValueError
    return text in TRUE


def _int(value: Any) -> int:
    if isinstance(value, bool) or (not isinstance(value, str) and not float(value).is_integer()):
        raise ValueError
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value) if isinstance(value, str) else value + 0


def _str(value: Any) -> Any:
    # YAML reads run_name: 7 as a number; what cannot be text is left to the settings' own types.
    return value if isinstance(value, list | Mapping | bool) else str(value)


def _strategy(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads an unquoted `no` as false


def _names(value: Any) -> Any:
    return _split_list(value)


def _floats(value: Any) -> list[float]:
    items = _split_list(value)
    return [float(item) for item in (items if isinstance(items, list) else [items])]


def _split_list(value: Any) -> Any:
    text = value.strip() if isinstance(value, str) else ""
    if text.startswith("[") and text.endswith("]"):
        return [item.strip().strip("'\"") for item in text[1:-1].split(",") if item.strip()]
    return value


def _json(value: Any) -> Any:
    """JSON, or YAML on one line, which needs no quotes (but reads 1e-5 as text)."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    import yaml

    try:
        return json.loads(value)
    except ValueError:
        pass
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError("neither JSON nor YAML") from error


_READERS = {
    "bool": _bool,
    "int": _int,
    "float": _float,
    "str": _str,
    "strategy": _strategy,
    "names": _names,
    "floats": _floats,
    "dict": _json,
    "any": _json,
}
