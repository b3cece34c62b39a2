"""TRL's keys to ours, before a model or a data set is touched; `python -m fasttr.config.trl` prints
the table."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from fasttr.config.trl_table import ACCELERATOR, OLDER_LOSSES, SECTIONS, TABLE, Key
from fasttr.errors import FasttrError

# Two names of one thing: a flag of one name replaces a file's key of the other.
_RIVALS = [
    {"gradient_checkpointing", "activation_checkpointing"},
    {"eval_strategy", "evaluation_strategy"},
    {"dtype", "torch_dtype"},
    {"warmup_steps", "warmup_ratio"},
    {"ref_update", "sync_ref_model"},
    {"ref_update_alpha", "ref_model_mixup_alpha"},
    {"ref_update_every", "ref_model_sync_steps"},
    {"train_batch_size", "per_device_train_batch_size"},
    {"train_batch_size", "gradient_accumulation_steps"},
]
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_KTO = ("kto", "apo_zero_unpaired")


def merge(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file and of flags, which win, also over a file's other name for the same
    thing."""
    replaced = {other for key in flags for pair in _RIVALS if key in pair for other in pair - {key}}
    return {key: value for key, value in file.items() if key not in replaced} | dict(flags)


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our settings, and one line for each key that is accepted without effect or that means another
    thing here.

    Values are what YAML reads, or text from a command line. FasttrError (key, got, advice) on a key
    that is refused.
    """
    known, optional = our_keys()
    if isinstance(folder := values.get("output_dir"), str):
        values = {**values, "output_dir": os.path.expanduser(folder)}
    for key in values:
        if key not in TABLE and key not in known:
            raise FasttrError(_unknown(key))
    given = {key: _convert(TABLE[key], value) for key, value in values.items() if key in TABLE}
    ours = {
        key: None if key in optional and is_none(v) else v
        for key, v in values.items()
        if key not in TABLE
    }
    notices: list[str] = []
    for name, value in given.items():
        row = TABLE[name]
        default = _is_default(row, value)
        if row.kind == "refused" and not default:
            raise FasttrError(f"{name}: got {value!r}; {row.note}")
        if row.kind == "ignored" and not default:
            notices.append(f"{name}: ignored: {row.note}")
        if row.kind == "honoured" and name in known and not (default and value in (None, [])):
            ours[name] = value
        elif row.kind == "honoured" and name not in (*known, "optim", "env") and not default:
            raise FasttrError(f"{name}: got {value!r}; it is not built; leave it out")
    _check_values(given)
    _rename(given, ours, notices)
    # Who writes train_batch_size has chosen our keys.
    if (
        ours.get("loss_type") in _KTO
        and "train_sampling_strategy" not in given
        and "train_batch_size" not in values
    ):
        notices.append(
            "train_sampling_strategy: absent, so random; TRL's KTO reads rows in their order: "
            "write sequential for that"
        )
    return ours, notices


def _check_values(given: dict[str, Any]) -> None:
    """Values that are refused although their key is honoured."""
    optimizer = given.get("optim", "adamw_torch")
    if optimizer not in _OPTIMIZERS:
        raise FasttrError(f"optim: got {optimizer!r}; wanted one of {', '.join(_OPTIMIZERS)}")
    losses = given.get("loss_type")
    for name in [losses] if isinstance(losses, str) else losses or []:
        if isinstance(name, str) and name in OLDER_LOSSES:
            raise FasttrError(f"loss_type: got {name!r}; {OLDER_LOSSES[name]}")
    if isinstance(given.get("env"), str):
        raise FasttrError("env: got text; wanted a mapping of names to values, in a file")


def _rename(given: dict[str, Any], ours: dict[str, Any], notices: list[str]) -> None:
    """Set our keys from those of TRL that have another name or another measure."""
    if given.get("activation_checkpointing") is not None:
        ours["gradient_checkpointing"] = given["activation_checkpointing"]
    if "evaluation_strategy" in given:
        ours.setdefault("eval_strategy", given["evaluation_strategy"])
    if given.get("torch_dtype") is not None:
        ours.setdefault("dtype", given["torch_dtype"])
    if given.get("warmup_ratio") and not ours.get("warmup_steps"):
        ratio = given["warmup_ratio"]
        if not 0 < ratio < 1:
            raise FasttrError(f"warmup_ratio: got {ratio!r}; wanted a share from 0 to below 1")
        ours["warmup_steps"] = ratio
    if (precision := given.get("mixed_precision", "no")) == "bf16":
        ours["bf16"] = True
    elif precision != "no":
        raise FasttrError(f"mixed_precision: got {precision!r}; use bf16")
    _rename_batch(given, ours)
    _rename_reference(given, ours, notices)
    _rename_model(given, ours, notices)


def _rename_batch(given: dict[str, Any], ours: dict[str, Any]) -> None:
    asked = [
        key
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if key in given
    ]
    if not asked:
        return
    if "train_batch_size" in ours:
        raise FasttrError(
            f"{asked[0]}: got {given[asked[0]]!r} beside train_batch_size; leave one of them out"
        )
    rows, times = (
        given.get(key, TABLE[key].default)
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    for key in asked:
        if given[key] < 1:
            raise FasttrError(f"{key}: got {given[key]!r}; wanted a whole number from 1")
    ours["train_batch_size"] = rows * times
    ours.setdefault("group_size", rows)


def _rename_reference(given: dict[str, Any], ours: dict[str, Any], notices: list[str]) -> None:
    alpha, every = given.get("ref_model_mixup_alpha"), given.get("ref_model_sync_steps")
    if "sync_ref_model" in given:
        moves = "none" if not given["sync_ref_model"] else "hard" if alpha == 1 else "soft"
        if ours.setdefault("ref_update", moves) != moves:
            raise FasttrError(
                f"sync_ref_model: got {given['sync_ref_model']} beside ref_update "
                f"{ours['ref_update']}; leave one out"
            )
    for ours_, theirs in (
        ("ref_update_alpha", "ref_model_mixup_alpha"),
        ("ref_update_every", "ref_model_sync_steps"),
    ):
        if (value := given.get(theirs)) is None:
            continue
        if ours.get("ref_update", "none") != "none":
            ours.setdefault(ours_, value)
        elif not _is_default(TABLE[theirs], value):
            notices.append(f"{theirs}: ignored: read only with sync_ref_model: true")
    if ours.get("ref_update") == "soft" and alpha is not None and not 0 <= alpha <= 1:
        raise FasttrError(f"ref_model_mixup_alpha: got {alpha!r}; wanted a number from 0 to 1")
    if every is not None and every < 1:
        raise FasttrError(f"ref_model_sync_steps: got {every!r}; wanted a whole number from 1")
    if given.get("precompute_ref_log_probs") and ours.get("ref_update", "none") != "none":
        notices.append(
            "precompute_ref_log_probs: TRL refuses it with a moving reference; here each window is "
            "scored"
        )


def _rename_model(given: dict[str, Any], ours: dict[str, Any], notices: list[str]) -> None:
    inside = {
        "dtype": "dtype",
        "torch_dtype": "dtype",
        "attn_implementation": "attn_implementation",
        "revision": "model_revision",
    }
    for key, value in (given.get("model_init_kwargs") or {}).items():
        if key in inside:
            ours[inside[key]] = value
        elif not (
            key in ("use_cache", "low_cpu_mem_usage")
            or (key == "trust_remote_code" and value is False)
        ):
            raise FasttrError(
                f"model_init_kwargs: got {key}: {value!r}; wanted only {', '.join(inside)}; leave "
                "it out"
            )
    kernel = ours.get("attn_implementation")
    if isinstance(kernel, str) and (
        kernel == "flash_attention_3" or kernel.startswith("kernels-community/")
    ):
        del ours["attn_implementation"]
        notices.append(
            f"attn_implementation: {kernel}: packed attention picks its own kernel, same values"
        )


def _convert(key: Key, value: Any) -> Any:
    """A value as TRL's parser reads it. FasttrError when it cannot."""
    kind, optional = key.type.removesuffix("?"), key.type.endswith("?")
    if value is None or (optional and is_none(value)):
        return None
    try:
        if kind == "bool":
            return _bool(value)
        if (
            kind == "int"
            and not isinstance(value, bool)
            and (isinstance(value, str) or float(value).is_integer())
        ):
            return int(value)
        if kind == "float" and not isinstance(value, bool):
            return float(value) if isinstance(value, str) else value + 0
        if kind in ("int", "float"):
            raise ValueError
        if kind == "str" and not isinstance(value, list | Mapping | bool):
            return str(value)  # YAML reads run_name: 7 as a number
        if kind == "strategy":  # YAML 1.1 reads an unquoted `no` as false
            return "no" if value is False else value
        if kind in ("names", "floats"):
            return _list(value, kind)
        if kind in ("dict", "any") and isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            return json.loads(value)
    except (ValueError, TypeError, OverflowError):
        wanted = {"names": "a list", "floats": "a list of float", "dict": "a mapping"}.get(
            kind, kind
        )
        raise FasttrError(
            f"{key.name}: got {value}; wanted {wanted}{' or none' if optional else ''}"
        ) from None
    if kind == "dict" and not isinstance(value, Mapping) and key.kind == "renamed":
        raise FasttrError(f"{key.name}: got {value!r}; wanted a mapping")
    return value


def _bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise ValueError
    return text in _TRUE


def _list(value: Any, kind: str) -> Any:
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("[") and text.endswith("]"):
            value = [item.strip().strip("'\"") for item in text[1:-1].split(",") if item.strip()]
    if kind == "names":
        return value
    return [float(item) for item in (value if isinstance(value, list) else [value])]


def takes_list(key: str) -> bool:
    """Whether several words after a flag are its list."""
    return key in TABLE and TABLE[key].type.startswith(("names", "floats"))


def stands_alone(key: str) -> bool:
    """Whether a flag without a value means true. Unknown keys do, so that they are named as
    such."""
    if key in TABLE:
        return TABLE[key].type.removesuffix("?") in ("bool", "any")
    return key not in our_keys()[0] or "bool" in str(_field_types()[key])


def is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ("none", "null")


def _is_default(key: Key, value: Any) -> bool:
    if isinstance(key.default, list) and not isinstance(value, list):
        value = [value]
    if key.type == "any" and key.default is None and value in (None, False, "", [], {}):
        return True
    if key.name == "accelerator_config" and isinstance(value, Mapping):
        return all(name in ACCELERATOR and ACCELERATOR[name] == v for name, v in value.items())
    return value == key.default and isinstance(value, bool) == isinstance(key.default, bool)


@cache
def our_keys() -> tuple[frozenset[str], frozenset[str]]:
    """Our settings, and those that may be none."""
    from fasttr.config.train_config import TrainConfig  # after `env` has been set: it imports torch

    fields = dataclasses.fields(TrainConfig)
    return frozenset(f.name for f in fields), frozenset(
        f.name for f in fields if "None" in str(f.type)
    )


def _field_types() -> dict[str, Any]:
    from fasttr.config.train_config import TrainConfig

    return {field.name: field.type for field in dataclasses.fields(TrainConfig)}


def nearest(key: str, keys: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing when no key is near."""
    close = difflib.get_close_matches(key, list(keys), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _unknown(key: str) -> str:
    base = key.removeprefix("no_")
    if base != key and (base in TABLE or base in our_keys()[0]):
        return f"unknown key {key!r}: write {base}: false"
    return f"unknown key {key!r}{nearest(key, [*our_keys()[0], *TABLE])}; --help lists all"


def markdown() -> str:
    """The whole table, one section for each place that keys come from."""
    out = []
    for title, keys in SECTIONS.items():
        out += [f"**{title}**", "", "| key | TRL's default | here | |", "|---|---|---|---|"]
        for key in keys:
            here = f"{key.ours}" if key.kind == "renamed" else key.kind
            default = json.dumps(key.default) if key.default is not None else "none"
            out.append(f"| `{key.name}` | {default} | {here} | {key.note} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    print(markdown())
