"""`fasttr grpo`, `fasttr rloo` and `fasttr ppo`: on-policy training, in TRL's keys or ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasttr.cli import arguments
from fasttr.errors import FasttrError
from fasttr.settings import settings_of

if TYPE_CHECKING:
    from fasttr.config.online_config import OnlineConfig

USAGE = "[--config FILE] [--SETTING VALUE ...]"
DESCRIPTION = (
    "Train a policy on its own completions. Data: a column prompt, text or messages; further "
    "columns go to the reward functions. Every flag may stand in a flat YAML file (--config FILE; "
    "flags win), under its name here or TRL's."
)
LISTS = ("reward_funcs", "reward_weights", "reward_clip_range")


def run_grpo(args: list[str]) -> None:
    _train("grpo", args)


def run_rloo(args: list[str]) -> None:
    _train("rloo", args)


def run_ppo(args: list[str]) -> None:
    _train("ppo", args)


def _train(command: str, args: list[str]) -> None:
    arguments.require_one_process()
    config = parse_online(command, args)
    from fasttr.training.online import train_online

    train_online(config)


def parse_online(command: str, args: list[str]) -> OnlineConfig:
    """The OnlineConfig of a command line. What is accepted without effect is printed."""
    words = arguments.read_words(args)
    from fasttr.config import online_keys, trl
    from fasttr.config.online_config import (
        DEFAULTS,
        FOREIGN,
        CriticSettings,
        OnlineConfig,
        PolicySettings,
        RewardSourceSettings,
        RolloutSettings,
    )
    from fasttr.config.trl_values import is_none, read_as

    defaults = DEFAULTS[command]
    settings = settings_of(OnlineConfig)
    groups = (PolicySettings, RolloutSettings, RewardSourceSettings, CriticSettings)
    own = {name for group in groups for name in settings_of(group)}
    shown = [
        one._replace(default=defaults.get(name, one.default))
        for name, one in settings.items()
        if name in own or name not in FOREIGN
    ]
    parser = arguments.settings_parser(f"fasttr {command}", DESCRIPTION, shown, USAGE)
    if words.wants_help:
        parser.parse_args(["--help"])
    flags = arguments.flag_values(
        words.flags,
        known={**settings, **online_keys.PPO_NAMES},
        takes_list=lambda key: key in LISTS or trl.takes_list(key),
        stands_alone=lambda key: (
            "bool" in str(settings[key].type) if key in own else trl.stands_alone(key)
        ),
    )
    words.file.pop("env", None)
    values = trl.merge(words.file, flags)
    is_ppo = command == "ppo"
    notices = online_keys.take_out(values, online_keys.PPO_KEYS if is_ppo else None)
    online_keys.generation_steps(values)
    if is_ppo:
        online_keys.rename_ppo(values, defaults)
    for name in LISTS:
        if isinstance(values.get(name), str) and not is_none(values[name]):
            values[name] = [values[name]]
    of_own: dict[str, Any] = {name: values.pop(name) for name in list(values) if name in own}
    foreign = [name for name in FOREIGN if name in values]
    if foreign:
        raise FasttrError(
            f"{foreign[0]}: got {values[foreign[0]]!r}; runs on rollouts do not read it: "
            "leave it out"
        )
    ours, more = trl.translate(values)
    read = {name: x for name, x in ours.items() if name not in FOREIGN}
    read |= {name: read_as(settings[name], value) for name, value in of_own.items()}
    _check_loss(command, read.get("loss_type", defaults["loss_type"]))
    config = OnlineConfig(**arguments.typed(parser, {**defaults, **read}))
    for notice in [*notices, *more]:
        print(notice)
    return config


def _check_loss(command: str, loss_type: Any) -> None:
    """An unknown loss is the configuration's to refuse."""
    from fasttr.losses.policy_gradient import LOSS_TYPES

    wanted = loss_type if loss_type in ("rloo", "ppo") else "grpo"
    if loss_type in LOSS_TYPES and command != wanted:
        raise FasttrError(
            f"loss_type: got {loss_type} with fasttr {command}; it is a loss of fasttr {wanted}"
        )
