"""`fasttr reward`: a reward model, in TRL's keys or ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasttr.cli import arguments
from fasttr.errors import FasttrError
from fasttr.settings import settings_of

if TYPE_CHECKING:
    from fasttr.config.reward_config import RewardConfig

USAGE = "[--config FILE] [--SETTING VALUE ...]"
DESCRIPTION = (
    "Train a reward model on pairs (chosen, rejected; margin; a column of weights), or on "
    "completions in their order, best first. Every flag may stand in a flat YAML file (--config "
    "FILE; flags win), under its name here or TRL's."
)


def run(args: list[str]) -> None:
    arguments.require_one_process()
    config = parse_reward(args)
    from fasttr.training.reward import train_reward

    train_reward(config)


def parse_reward(args: list[str]) -> RewardConfig:
    """The RewardConfig of a command line. What is accepted without effect is printed."""
    words = arguments.read_words(args)
    from fasttr.config import trl
    from fasttr.config.reward_config import FOREIGN, RewardConfig, RewardSettings
    from fasttr.config.train_config import TrainConfig
    from fasttr.config.trl_values import read_as

    settings = settings_of(RewardConfig)
    own = settings_of(RewardSettings).keys() - settings_of(TrainConfig).keys()
    shown = [one for name, one in settings.items() if name not in FOREIGN]
    parser = arguments.settings_parser("fasttr reward", DESCRIPTION, shown, USAGE)
    if words.wants_help:
        parser.parse_args(["--help"])
    flags = arguments.flag_values(
        words.flags,
        known=settings,
        takes_list=trl.takes_list,
        stands_alone=lambda key: key not in own and trl.stands_alone(key),
    )
    words.file.pop("env", None)
    values = trl.merge(words.file, flags)
    of_reward = {name: values.pop(name) for name in list(values) if name in own}
    asked = [name for name in FOREIGN if name in values]
    if asked:
        raise FasttrError(
            f"{asked[0]}: got {values[asked[0]]!r}; a reward model has no loss to choose, no "
            "reference and no samples: leave it out"
        )
    ours, notices = trl.translate(values)
    read: dict[str, Any] = {name: x for name, x in ours.items() if name not in FOREIGN}
    read |= {name: read_as(settings[name], value) for name, value in of_reward.items()}
    config = RewardConfig(**arguments.typed(parser, read))
    for notice in notices:
        print(notice)
    return config
