"""`fasttr ocrm`: off-policy-corrected reward models; with --demo on generated data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasttr.cli import arguments
from fasttr.errors import FasttrError, did_you_mean
from fasttr.settings import settings_of

if TYPE_CHECKING:
    from fasttr.config.ocrm_config import OcrmConfig

USAGE = (
    "[--config FILE] [--demo] [--SETTING VALUE ...] [--rm_SETTING VALUE ...] "
    "[--ppo_SETTING VALUE ...] [--dpo_SETTING VALUE ...]"
)
DESCRIPTION = (
    "Stages of a reward model and a policy that follows it; the reward model is refitted to the "
    "first pairs, weighted by the density ratio of the policy to their writer. Further flags are "
    "those of fasttr rloo, grpo or ppo, with rm_ before them of fasttr reward, with ppo_ and dpo_ "
    "those of the baselines. --demo runs it on generated data, from nothing."
)


def run(args: list[str]) -> None:
    if "--demo" in args:
        _demo([word for word in args if word != "--demo"])
        return
    arguments.require_one_process()
    config = parse_ocrm(args)
    from fasttr.evaluation.stage_table import table
    from fasttr.training.ocrm import run_ocrm

    print("\n" + table(run_ocrm(config)))


def parse_ocrm(args: list[str]) -> OcrmConfig:
    """The OcrmConfig of a command line."""
    words = arguments.read_words(args)
    from fasttr.config.ocrm_config import OF_DPO, OF_PPO, OF_REWARD, OcrmConfig, OcrmSettings
    from fasttr.config.online_config import OnlineConfig
    from fasttr.config.reward_config import RewardConfig
    from fasttr.config.train_config import TrainConfig
    from fasttr.config.trl_values import read_as

    own = settings_of(OcrmSettings)
    online = settings_of(OnlineConfig)
    # Groups of settings: what stands before their names, and whose they are.
    others = {
        "rm": (OF_REWARD, settings_of(RewardConfig)),
        "ppo": (OF_PPO, online),
        "dpo": (OF_DPO, settings_of(TrainConfig)),
    }
    parser = arguments.settings_parser("fasttr ocrm", DESCRIPTION, own.values(), USAGE)
    if words.wants_help:
        parser.parse_args(["--help"])
    prefixed = {
        before + name: one for before, group in others.values() for name, one in group.items()
    }
    known = {**online, **prefixed, **own}
    flags = arguments.flag_values(
        words.flags,
        known=known,
        takes_list=lambda key: key in known and "list" in str(known[key].type),
        stands_alone=lambda key: key not in known or "bool" in str(known[key].type),
    )
    values = {**words.file, **flags}
    if isinstance(values.get("arms"), str):
        values["arms"] = [values["arms"]]
    for name in values:
        if name not in known:
            raise FasttrError(f"unknown key {name!r}{did_you_mean(name, known)}")
    values = {name: read_as(known[name], value) for name, value in values.items()}
    missing = [one.name for one in own.values() if one.is_required and one.name not in values]
    if missing:
        raise FasttrError(f"{missing[0]}: missing; {own[missing[0]].sentence}")
    mine = {name: value for name, value in values.items() if name in own}
    rl = {name: x for name, x in values.items() if name not in own and name not in prefixed}
    groups: dict[str, Any] = {}
    for group, (before, settings) in others.items():
        of_group = {
            name.removeprefix(before): x
            for name, x in values.items()
            if name in prefixed and name not in own and name.startswith(before)
        }
        groups[group] = _typed(group, settings, of_group)
    return OcrmConfig(**arguments.typed(parser, mine), rl=_typed("rloo", online, rl), **groups)


def _typed(prog: str, settings: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values in the types of their settings, without defaults."""
    parser = arguments.settings_parser(
        f"fasttr {prog}", "", [settings[name]._replace(default=None) for name in values]
    )
    typed = arguments.typed(parser, values)
    return {name: typed[name] for name in values}


def _demo(args: list[str]) -> None:
    from fasttr.toy.ocrm_demo import OcrmDemoSettings, ocrm_demo

    values = arguments.settings_of_command(
        "fasttr ocrm --demo",
        "The exact toy's picture, and a small language model through the stages.",
        OcrmDemoSettings,
        args,
    )
    ocrm_demo(OcrmDemoSettings(**values))
