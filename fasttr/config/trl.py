"""TRL's keys to ours, before a model or a data set is touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from fasttr.config.methods import METHODS, Method
from fasttr.config.train_config import TrainConfig
from fasttr.config.trl_launch import launch_of
from fasttr.config.trl_table import MODEL_ENTRIES, RIVALS, SPEED_ENTRIES, TABLE
from fasttr.config.trl_values import converted, is_default, is_none, named_columns
from fasttr.config.unknown_keys import unknown_key
from fasttr.distributed.launchers import WHOLE
from fasttr.errors import FasttrError, all_of
from fasttr.losses import unknown_losses
from fasttr.settings import out_of_range, settings_of

_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
_EVAL_BATCH = "per_device_eval_batch_size"
_ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
_SFT_LOSSES = {"nll": "sft", "chunked_nll": "sft"}


def merge(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file and of flags, which win, also over a file's other name for a thing."""
    replaced = set()
    for key in flags:
        for pair in RIVALS:
            if key in pair:
                replaced |= pair - {key}
    return {key: value for key, value in file.items() if key not in replaced} | dict(flags)


def translate(
    values: Mapping[str, Any],
    method: Method = METHODS["train"],
    preset: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Our settings, and one line for each key that is accepted without effect or with another.

    Values are what YAML reads, or text from a command line; those of a preset lie below them and
    are only looked at. FasttrError (key, got, advice) that
    names every key which is refused.
    """
    translation = _Translation(values, method, preset or {})
    translation.take_over()
    for step in (
        translation.check_values,
        translation.rename_plain_ones,
        translation.rename_loss,
        translation.rename_warmup,
        translation.rename_precision,
        translation.rename_launch,
        translation.rename_batch,
        translation.rename_evaluation,
        translation.rename_reference,
        translation.rename_model,
        translation.rename_data,
        translation.leave_out_adapter,
    ):
        translation.attempt(step)
    if translation.refusals:
        raise all_of([*translation.refusals, *translation.out_of_range()])
    return translation.ours, translation.notices


def takes_list(key: str) -> bool:
    """Whether several words after a flag are its list."""
    return key == "columns" or (key in TABLE and TABLE[key].type.startswith(("names", "floats")))


def stands_alone(key: str) -> bool:
    """Whether a flag without a value means true. Unknown keys do: they are named as such."""
    if key in TABLE:
        return TABLE[key].type.removesuffix("?") in ("bool", "any")
    settings = settings_of(TrainConfig)
    return key not in settings or "bool" in str(settings[key].type)


class _Translation:
    """The values of a file and of flags on their way to settings of ours."""

    def __init__(self, values: Mapping[str, Any], method: Method, preset: Mapping[str, Any]):
        settings = settings_of(TrainConfig)
        self.preset = preset
        self.method = method
        self.given: dict[str, Any] = {}  # TRL's keys, in their types
        self.ours: dict[str, Any] = {}
        self.notices: list[str] = []
        self.refusals: list[str] = []
        for key, value in values.items():
            if key in TABLE:
                self.attempt(self._give, key, value)
            elif key not in settings:
                self.refusals.append(unknown_key(key))
            else:
                leaves_out = settings[key].is_optional and is_none(value)
                self.ours[key] = None if leaves_out else value

    def attempt(self, act: Callable[..., None], *values: Any) -> None:
        """Do one thing; what it refuses is kept, so that all of a file's refusals are said."""
        try:
            act(*values)
        except FasttrError as error:
            self.refusals.append(str(error))

    def _give(self, key: str, value: Any) -> None:
        if key == "output_dir" and isinstance(value, str):
            value = os.path.expanduser(value)
        self.given[key] = converted(TABLE[key], value)

    def take_over(self) -> None:
        """Keys that keep their name, are ignored, or are refused."""
        settings = settings_of(TrainConfig)
        for name, value in self.given.items():
            key = TABLE[name]
            changes_nothing = is_default(key, value)
            if key.kind == "refused" and not changes_nothing:
                self.refusals.append(f"{name}: got {value!r:.60}; {key.note}")
            if key.kind == "ignored" and not changes_nothing:
                self.notices.append(f"{name}: ignored: {key.note}")
            is_absent = changes_nothing and value in (None, [])
            if key.kind == "honoured" and name in settings and not is_absent:
                self.ours[name] = value

    def check_values(self) -> None:
        """Values that are refused although their key is honoured."""
        if isinstance(self.given.get("env"), str):
            raise FasttrError("env: got text; wanted a mapping of names to values, in a file")
        columns = self.ours.get("columns")
        if isinstance(columns, str | list):
            self.ours["columns"] = named_columns(columns)

    def out_of_range(self) -> list[str]:
        """What would be refused next of the keys that have their types already: said with the rest,
        a file is not read again and again."""
        settings = settings_of(TrainConfig)
        typed = [name for name in self.given if name in self.ours]
        found = [out_of_range(settings[name], self.ours[name]) for name in typed]
        losses = self.ours.get("loss_type") if "loss_type" in typed else None
        unknown = unknown_losses([losses] if isinstance(losses, str) else losses or [])
        return [reason for reason in (*found, *unknown) if reason is not None]

    def rename_plain_ones(self) -> None:
        for key in TABLE.values():
            if key.plainly and self.given.get(key.name) is not None:
                self._rename_plainly(key.name, key.ours)
        self._rename_plainly("activation_checkpointing", "gradient_checkpointing", wins=True)

    def rename_loss(self) -> None:
        """`trl sft` has names of its own; label_smoothing is passed over where TRL does so."""
        if self.given.get("completion_only_loss") is False:
            raise FasttrError(
                "completion_only_loss: got false; a prompt is never trained on: give whole "
                "conversations under messages, or leave it out"
            )
        losses = self.ours.get("loss_type")
        names = [losses] if isinstance(losses, str) else losses or []
        if self.method.name == "sft" and all(name in _SFT_LOSSES for name in names):
            self.ours.pop("loss_type", None)
        reads_smoothing = {"cdpo", "robust", "exo_pair", "aot", "aot_unpaired"}
        is_trls = self.method.name == "dpo" and not reads_smoothing & set(names)
        if is_trls and self.ours.get("label_smoothing"):
            del self.ours["label_smoothing"]
            self.notices.append(
                "label_smoothing: ignored: none of the losses reads it, as in TRL; for "
                "conservative DPO there is loss_type cdpo"
            )

    def rename_warmup(self) -> None:
        ratio = self.given.get("warmup_ratio")
        if not ratio or self.ours.get("warmup_steps"):
            return
        if not 0 < ratio < 1:
            raise FasttrError(f"warmup_ratio: got {ratio!r}; wanted a share from 0 to below 1")
        self.ours["warmup_steps"] = ratio

    def rename_precision(self) -> None:
        self._take_precision(self.given.get("mixed_precision", "no"))

    def _take_precision(self, precision: str) -> None:
        if precision == "bf16":
            self.ours.setdefault("bf16", True)
        elif precision != "no":
            raise FasttrError(f"mixed_precision: got {precision!r}; use bf16")

    def rename_batch(self) -> None:
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
        if self.method.averages_the_step:
            return
        of_all = self._is_kto and world > 1
        self.ours.setdefault("group_size", rows * world if of_all else rows)
        if of_all:
            self.ours.setdefault("mismatch_size", rows)
        if times * world > 1:
            self.ours.setdefault("micro_batch_size", rows)

    def rename_evaluation(self) -> None:
        """A file in TRL's measures evaluates in batches, 8 rows of a device where it says nothing:
        a loss that couples rows sees those together."""
        if not any(key in self.given for key in (*_BATCH, _EVAL_BATCH)):
            return
        rows = self.given.get(_EVAL_BATCH, TABLE[_EVAL_BATCH].default)
        if rows < 1:
            raise FasttrError(f"{_EVAL_BATCH}: got {rows!r}; wanted a whole number from 1")
        world = _processes(self.ours.get("num_processes")) if self._is_kto else 1
        self.ours.setdefault("eval_group_size", rows * world)

    @property
    def _is_kto(self) -> bool:
        """TRL takes KTO's estimate over all devices, of completions that each of them rotates."""
        return self.ours.get("loss_type", self.method.defaults.get("loss_type")) == "kto"

    def rename_launch(self) -> None:
        """Processes and shards; what stands beside them in a file of settings wins."""
        launch = launch_of(self.given)
        if launch.num_processes is not None and not os.environ.get("WORLD_SIZE"):
            self.ours.setdefault("num_processes", launch.num_processes)
        if launch.sharding != WHOLE:
            self.ours.setdefault("shard_size", launch.sharding.shard_size)
            if not launch.sharding.reshard_after_forward:
                self.ours.setdefault("reshard_after_forward", False)
        if "mixed_precision" not in self.given:
            self._take_precision(launch.precision or "no")

    def leave_out_adapter(self) -> None:
        """TRL's keys of an adapter mean nothing without one."""
        if self.ours.get("use_peft"):
            return
        for name in _ADAPTER:
            self.ours.pop(name, None)
            if name in self.given and not is_default(TABLE[name], self.given[name]):
                self.notices.append(f"{name}: ignored: read only with use_peft: true")

    def rename_reference(self) -> None:
        self._rename_update()
        self._check_forgotten_update()
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

    def rename_model(self) -> None:
        entries = self.given.get("model_init_kwargs") or {}
        if not isinstance(entries, Mapping):
            raise FasttrError(f"model_init_kwargs: got {entries!r}; wanted a mapping")
        for key, value in entries.items():
            self.attempt(self._take_model_entry, key, value)
        if self.given.get("use_flash_attention_2"):
            self.ours.setdefault("attn_implementation", "flash_attention_2")
        if self.given.get("torch_compile"):
            self.ours.setdefault("compile", True)
        kernel = self.ours.get("attn_implementation")
        if isinstance(kernel, str) and kernel.startswith(
            ("flash_attention_3", "kernels-community/")
        ):
            del self.ours["attn_implementation"]
            self.notices.append(
                f"attn_implementation: {kernel}: packed attention picks its own kernel, same values"
            )

    def rename_data(self) -> None:
        """alignment-handbook's mixer: a mapping of data sets to shares of their train rows."""
        mixer = self.given.get("dataset_mixer")
        if mixer is None:
            return
        if not isinstance(mixer, Mapping) or not mixer:
            raise FasttrError(
                f"dataset_mixer: got {mixer!r:.60}; wanted a mapping of data sets to shares"
            )
        splits = self.given.get("dataset_splits") or ["train", "test"]
        configs = self.given.get("dataset_configs") or [None] * len(mixer)
        if len(configs) != len(mixer):
            raise FasttrError(
                f"dataset_configs: got {len(configs)} for {len(mixer)} data sets; wanted one each"
            )
        self.ours["dataset_mixture"] = _mixture_of(mixer, list(configs), list(splits))

    def _rename_plainly(self, theirs: str, ours: str, wins: bool = False) -> None:
        value = self.given.get(theirs)
        if value is not None and (wins or ours not in self.ours):
            self.ours[ours] = value

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

    def _check_forgotten_update(self) -> None:
        """Who sets how the reference moves, and not that it does, has forgotten it: a whole run of
        plain DPO would be the price."""
        if "ref_update" in self.ours or "ref_update" in self.preset:
            return
        for name in ("ref_update_alpha", "ref_update_every"):
            if name in self.ours:
                raise FasttrError(
                    f"{name}: got {self.ours[name]} without ref_update; write ref_update: soft (or "
                    "hard) too, or ref_update: none for a reference that stays"
                )

    def _check_reference(self) -> None:
        alpha = self.given.get("ref_model_mixup_alpha")
        every = self.given.get("ref_model_sync_steps")
        if self.ours.get("ref_update") == "soft" and alpha is not None and not 0 <= alpha <= 1:
            raise FasttrError(f"ref_model_mixup_alpha: got {alpha!r}; wanted a number from 0 to 1")
        if every is not None and every < 1:
            raise FasttrError(f"ref_model_sync_steps: got {every!r}; wanted a whole number from 1")

    def _take_model_entry(self, key: str, value: Any) -> None:
        if key in MODEL_ENTRIES:
            self.ours[MODEL_ENTRIES[key]] = value
            return
        if key in SPEED_ENTRIES:
            self.notices.append(f"model_init_kwargs: {key}: ignored: {SPEED_ENTRIES[key]}")
            return
        raise FasttrError(
            f"model_init_kwargs: got {key}: {value!r:.60}; wanted only {', '.join(MODEL_ENTRIES)}; "
            "leave it out"
        )


def _mixture_of(mixer: Mapping[str, Any], configs: list[Any], splits: list[Any]) -> dict[str, Any]:
    """`dataset_mixer` as a `dataset_mixture`: the first rows of train splits, all of test splits,
    each shuffled together with the seed that alignment-handbook writes in its code."""
    train, test = [], []
    for split in splits:
        is_train = "train" in str(split)
        if not is_train and "test" not in str(split):
            raise FasttrError(
                f"dataset_splits: got {split!r}; wanted names with train or test in them"
            )
        for (name, share), config in zip(mixer.items(), configs, strict=True):
            part = {"id": str(name), "config": config, "split": str(split)}
            if is_train:
                train.append({**part, "weight": share})
            else:
                test.append(part)
    return {"datasets": train, "test_datasets": test, "seed": 42, "draws_rows": False}


def _processes(asked: int | None) -> int:
    """How many processes a launcher has started, or fasttr will."""
    started = os.environ.get("WORLD_SIZE", "")
    return int(started) if started.isdigit() and started != "0" else asked or 1
