"""TRL's keys to ours, before a model or a data set is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fasttr.config.train_config import TrainConfig
from fasttr.config.trl_table import OLDER_LOSSES, TABLE
from fasttr.config.trl_values import converted, is_default, is_none
from fasttr.errors import FasttrError, did_you_mean
from fasttr.settings import settings_of

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
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
_KTO = ("kto", "apo_zero_unpaired")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
# Entries of model_init_kwargs that are settings of ours, and those that change nothing.
_MODEL_ENTRIES = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
}
_MODEL_ENTRIES_WITHOUT_EFFECT = ("use_cache", "low_cpu_mem_usage")


def merge(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file and of flags, which win, also over a file's other name for a thing."""
    replaced = set()
    for key in flags:
        for pair in _RIVALS:
            if key in pair:
                replaced |= pair - {key}
    return {key: value for key, value in file.items() if key not in replaced} | dict(flags)


def translate(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our settings, and one line for each key that is accepted without effect or with another.

    Values are what YAML reads, or text from a command line. FasttrError (key, got, advice) on a key
    that is refused.
    """
    translation = _Translation(values)
    translation.take_over()
    translation.check_values()
    translation.rename()
    translation.notice_order()
    return translation.ours, translation.notices


def takes_list(key: str) -> bool:
    """Whether several words after a flag are its list."""
    return key in TABLE and TABLE[key].type.startswith(("names", "floats"))


def stands_alone(key: str) -> bool:
    """Whether a flag without a value means true. Unknown keys do: they are named as such."""
    if key in TABLE:
        return TABLE[key].type.removesuffix("?") in ("bool", "any")
    settings = settings_of(TrainConfig)
    return key not in settings or "bool" in str(settings[key].type)


class _Translation:
    """The values of a file and of flags on their way to settings of ours."""

    def __init__(self, values: Mapping[str, Any]):
        settings = settings_of(TrainConfig)
        folder = values.get("output_dir")
        if isinstance(folder, str):
            values = {**values, "output_dir": os.path.expanduser(folder)}
        self.values = values
        self.given: dict[str, Any] = {}  # TRL's keys, in their types
        self.ours: dict[str, Any] = {}
        self.notices: list[str] = []
        for key, value in values.items():
            if key in TABLE:
                self.given[key] = converted(TABLE[key], value)
            elif key not in settings:
                raise FasttrError(_unknown(key))
            else:
                leaves_out = settings[key].is_optional and is_none(value)
                self.ours[key] = None if leaves_out else value

    def take_over(self) -> None:
        """Keys that keep their name, are ignored, or are refused."""
        settings = settings_of(TrainConfig)
        for name, value in self.given.items():
            key = TABLE[name]
            changes_nothing = is_default(key, value)
            if key.kind == "refused" and not changes_nothing:
                raise FasttrError(f"{name}: got {value!r}; {key.note}")
            if key.kind == "ignored" and not changes_nothing:
                self.notices.append(f"{name}: ignored: {key.note}")
            is_absent = changes_nothing and value in (None, [])
            if key.kind == "honoured" and name in settings and not is_absent:
                self.ours[name] = value

    def check_values(self) -> None:
        """Values that are refused although their key is honoured."""
        optimizer = self.given.get("optim", "adamw_torch")
        if optimizer not in _OPTIMIZERS:
            raise FasttrError(f"optim: got {optimizer!r}; wanted one of {', '.join(_OPTIMIZERS)}")
        losses = self.given.get("loss_type") or []
        for name in [losses] if isinstance(losses, str) else losses:
            if isinstance(name, str) and name in OLDER_LOSSES:
                raise FasttrError(f"loss_type: got {name!r}; {OLDER_LOSSES[name]}")
        if isinstance(self.given.get("env"), str):
            raise FasttrError("env: got text; wanted a mapping of names to values, in a file")

    def rename(self) -> None:
        """Keys of TRL that have another name here, or another measure."""
        self._rename_plainly("activation_checkpointing", "gradient_checkpointing", wins=True)
        self._rename_plainly("evaluation_strategy", "eval_strategy")
        self._rename_plainly("torch_dtype", "dtype")
        self._rename_warmup()
        self._rename_precision()
        self._rename_batch()
        self._rename_launch()
        self._rename_reference()
        self._rename_model()
        self._leave_out_adapter()

    def notice_order(self) -> None:
        # Who writes train_batch_size has chosen our keys.
        is_trls = "train_batch_size" not in self.values
        orders_rows = "train_sampling_strategy" in self.given
        if self.ours.get("loss_type") in _KTO and is_trls and not orders_rows:
            self.notices.append(
                "train_sampling_strategy: absent, so random; TRL's KTO reads rows in their order: "
                "write sequential for that"
            )

    def _rename_plainly(self, theirs: str, ours: str, wins: bool = False) -> None:
        value = self.given.get(theirs)
        if value is not None and (wins or ours not in self.ours):
            self.ours[ours] = value

    def _rename_warmup(self) -> None:
        ratio = self.given.get("warmup_ratio")
        if not ratio or self.ours.get("warmup_steps"):
            return
        if not 0 < ratio < 1:
            raise FasttrError(f"warmup_ratio: got {ratio!r}; wanted a share from 0 to below 1")
        self.ours["warmup_steps"] = ratio

    def _rename_precision(self) -> None:
        precision = self.given.get("mixed_precision", "no")
        if precision == "bf16":
            self.ours["bf16"] = True
        elif precision != "no":
            raise FasttrError(f"mixed_precision: got {precision!r}; use bf16")

    def _rename_batch(self) -> None:
        """Rows of a device times accumulation are a step; rows of a device are a loss's group."""
        asked = [key for key in _BATCH if key in self.given]
        if not asked:
            return
        if "train_batch_size" in self.ours:
            raise FasttrError(
                f"{asked[0]}: got {self.given[asked[0]]!r} beside train_batch_size; leave one of "
                "them out"
            )
        for key in asked:
            if self.given[key] < 1:
                raise FasttrError(f"{key}: got {self.given[key]!r}; wanted a whole number from 1")
        rows, times = (self.given.get(key, TABLE[key].default) for key in _BATCH)
        world = _processes(self.ours.get("num_processes"))
        self.ours["train_batch_size"] = rows * times * world
        # TRL takes KTO's estimate over all devices, of completions that each of them rotates.
        of_all = self.ours.get("loss_type") == "kto" and world > 1
        self.ours.setdefault("group_size", rows * world if of_all else rows)
        if of_all:
            self.ours.setdefault("mismatch_size", rows)

    def _rename_launch(self) -> None:
        plan = self.given.get("accelerate_config", "single_gpu")
        if plan not in ("single_gpu", "multi_gpu"):
            raise FasttrError(
                f"accelerate_config: got {plan!r}; wanted single_gpu or multi_gpu, with "
                "num_processes: sharding is not built"
            )

    def _rename_reference(self) -> None:
        self._rename_update()
        moves = self.ours.get("ref_update", "none") != "none"
        for ours, theirs in (
            ("ref_update_alpha", "ref_model_mixup_alpha"),
            ("ref_update_every", "ref_model_sync_steps"),
        ):
            value = self.given.get(theirs)
            if value is None:
                continue
            if moves:
                self.ours.setdefault(ours, value)
            elif not is_default(TABLE[theirs], value):
                self.notices.append(f"{theirs}: ignored: read only with sync_ref_model: true")
        self._check_reference()
        if self.given.get("precompute_ref_log_probs") and moves:
            self.notices.append(
                "precompute_ref_log_probs: TRL refuses it with a moving reference; here each "
                "window is scored"
            )

    def _rename_update(self) -> None:
        if "sync_ref_model" not in self.given:
            return
        update = "none"
        if self.given["sync_ref_model"]:
            update = "hard" if self.given.get("ref_model_mixup_alpha") == 1 else "soft"
        if self.ours.setdefault("ref_update", update) != update:
            raise FasttrError(
                f"sync_ref_model: got {self.given['sync_ref_model']} beside ref_update "
                f"{self.ours['ref_update']}; leave one out"
            )

    def _check_reference(self) -> None:
        alpha = self.given.get("ref_model_mixup_alpha")
        every = self.given.get("ref_model_sync_steps")
        if self.ours.get("ref_update") == "soft" and alpha is not None and not 0 <= alpha <= 1:
            raise FasttrError(f"ref_model_mixup_alpha: got {alpha!r}; wanted a number from 0 to 1")
        if every is not None and every < 1:
            raise FasttrError(f"ref_model_sync_steps: got {every!r}; wanted a whole number from 1")

    def _rename_model(self) -> None:
        entries = self.given.get("model_init_kwargs") or {}
        if not isinstance(entries, Mapping):
            raise FasttrError(f"model_init_kwargs: got {entries!r}; wanted a mapping")
        for key, value in entries.items():
            if key in _MODEL_ENTRIES:
                self.ours[_MODEL_ENTRIES[key]] = value
                continue
            trusts_nobody = key == "trust_remote_code" and value is False
            if key not in _MODEL_ENTRIES_WITHOUT_EFFECT and not trusts_nobody:
                raise FasttrError(
                    f"model_init_kwargs: got {key}: {value!r}; wanted only "
                    f"{', '.join(_MODEL_ENTRIES)}; leave it out"
                )
        kernel = self.ours.get("attn_implementation")
        if isinstance(kernel, str) and kernel.startswith(
            ("flash_attention_3", "kernels-community/")
        ):
            del self.ours["attn_implementation"]
            self.notices.append(
                f"attn_implementation: {kernel}: packed attention picks its own kernel, same values"
            )

    def _leave_out_adapter(self) -> None:
        """TRL's keys of an adapter mean nothing without one."""
        if self.ours.get("use_peft"):
            return
        for name in _ADAPTER:
            self.ours.pop(name, None)
            if name in self.given and not is_default(TABLE[name], self.given[name]):
                self.notices.append(f"{name}: ignored: read only with use_peft: true")


def _processes(asked: int | None) -> int:
    """How many processes a launcher has started, or fasttr will."""
    started = os.environ.get("WORLD_SIZE", "")
    return int(started) if started.isdigit() and started != "0" else asked or 1


def _unknown(key: str) -> str:
    settings = settings_of(TrainConfig)
    base = key.removeprefix("no_")
    if base != key and (base in TABLE or base in settings):
        return f"unknown key {key!r}: write {base}: false"
    return f"unknown key {key!r}{did_you_mean(key, [*settings, *TABLE])}; --help lists all"
