"""`fasttr train`, and `fasttr dpo`, `kto` and `sft`, named as TRL's: flags over file over preset
over the command's own defaults, in TRL's keys or ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fasttr.cli import arguments
from fasttr.cli.launch import launch, needs_launch, speaks
from fasttr.errors import FasttrError, did_you_mean
from fasttr.settings import Setting, settings_of

if TYPE_CHECKING:
    from fasttr.config.methods import Method
    from fasttr.config.train_config import TrainConfig

USAGE = (
    "[--recipe NAME] [--config FILE] [--preset NAME]\n"
    "       [--print_config[=skip_default]] [--SETTING VALUE ...]"
)
DESCRIPTION = (
    "The reference of a loss may move (--ref_update). Every flag may stand in a flat YAML file "
    "(--config FILE; flags win), under its name here or TRL's; --preset NAME takes the TR paper's "
    "settings, --recipe NAME a whole file (fasttr recipes lists them), --print_config shows the "
    "settings of a run."
)


def run(args: list[str]) -> None:
    _train(args, "train")


def run_dpo(args: list[str]) -> None:
    _train(args, "dpo")


def run_kto(args: list[str]) -> None:
    _train(args, "kto")


def run_sft(args: list[str]) -> None:
    _train(args, "sft")


def _train(args: list[str], method: str) -> None:
    config = parse_train(args, method)
    if needs_launch(config.num_processes):
        launch([method, *args], config.num_processes)
    from fasttr.training.loop import train

    train(config)


def parse_train(args: list[str], method: str = "train") -> TrainConfig:
    """The TrainConfig of a command line. What is accepted without effect is printed."""
    words = arguments.read_words(args)
    _set_environment(words.file.pop("env", None) or {})
    from fasttr.config import trl
    from fasttr.config.methods import METHODS, check_method
    from fasttr.config.train_config import TrainConfig

    of_method = METHODS[method]
    settings = settings_of(TrainConfig)
    parser = _parser(of_method, settings)
    if words.wants_help:
        parser.parse_args(["--help"])
    flags = arguments.flag_values(
        words.flags, known=settings, takes_list=trl.takes_list, stands_alone=trl.stands_alone
    )
    values = trl.merge(words.file, flags)
    preset_name = values.pop("preset", None)
    preset = _preset(preset_name)
    ours, notices = trl.translate(values, of_method, preset)
    _check_preset(preset_name, preset, ours)
    asked = {**of_method.defaults, **preset, **ours}
    check_method(of_method, asked)
    config = TrainConfig(**arguments.typed(parser, asked))
    if words.print_config is not None:
        _print_config(config, skips_defaults="skip_default" in words.print_config)
    if speaks() and not needs_launch(config.num_processes):
        for notice in notices:
            print(notice)
    return config


def _parser(method: Method, settings: Mapping[str, Setting]) -> Any:
    """Of all settings, with the defaults and the losses of a method."""
    shown = {
        name: one._replace(default=method.defaults.get(name, one.default))
        for name, one in settings.items()
    }
    named = f"{shown['loss_type'].help}; of {', '.join(method.losses)}"
    shown["loss_type"] = shown["loss_type"]._replace(help=named)
    about = f"{method.about} {DESCRIPTION}"
    return arguments.settings_parser(f"fasttr {method.name}", about, shown.values(), USAGE)


def _set_environment(env: Any) -> None:
    """Before torch is imported, which reads some of it."""
    if not isinstance(env, Mapping):
        raise FasttrError(f"env: got {env!r}; wanted a mapping of names to values")
    for key, value in env.items():
        try:
            os.environ[str(key)] = str(value)
        except ValueError as error:
            raise FasttrError(f"env: got {key!r}: {value!r}; {error}") from error


def _preset(name: Any) -> dict[str, Any]:
    from fasttr.config.train_config import PRESETS

    if name is None:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        near = did_you_mean(str(name), PRESETS)
        raise FasttrError(f"preset: got {name!r}; wanted one of {', '.join(PRESETS)}{near}")
    return PRESETS[name]


def _check_preset(name: Any, preset: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    asked = ours.get("ref_update")
    if preset and asked not in (None, preset["ref_update"]):
        raise FasttrError(
            f"ref_update: got {asked} with preset {name}, which means {preset['ref_update']}; "
            "leave one of them out"
        )


def _print_config(config: TrainConfig, skips_defaults: bool) -> None:
    """Print the settings as a file that runs again, and end."""
    import yaml

    defaults = {name: one.default for name, one in settings_of(type(config)).items()}
    values = config.as_dict()
    if skips_defaults:
        values = {name: value for name, value in values.items() if value != defaults[name]}
    print(yaml.safe_dump(values, sort_keys=False), end="")
    raise SystemExit(0)
