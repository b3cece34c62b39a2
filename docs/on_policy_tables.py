"""The tables of ON_POLICY.md, made from the code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from docs.markdown import head, row
from fasttr.config.ocrm_config import OcrmSettings
from fasttr.config.online_config import (
    CriticSettings,
    PolicySettings,
    RewardSourceSettings,
    RolloutSettings,
)
from fasttr.config.online_keys import KEYS, PPO_KEYS, PPO_NAMES, OnlineKey
from fasttr.config.reward_config import RewardSettings
from fasttr.metrics.names import ONLINE_METRICS, REWARD_METRICS, Metric
from fasttr.settings import settings_of


def reward_settings() -> str:
    return _settings(RewardSettings)


def online_settings() -> str:
    return _settings(PolicySettings, RolloutSettings, RewardSourceSettings)


def critic_settings() -> str:
    return _settings(CriticSettings)


def ocrm_settings() -> str:
    return _settings(OcrmSettings)


def reward_metrics() -> str:
    return _metrics(REWARD_METRICS)


def online_metrics() -> str:
    return _metrics(ONLINE_METRICS)


def online_keys() -> str:
    return _keys(KEYS)


def ppo_keys() -> str:
    names = [row(f"`{theirs}`", f"`{ours}`") for theirs, ours in PPO_NAMES.items()]
    return "\n".join([*head("PPOConfig", "here"), *names]) + "\n\n" + _keys(PPO_KEYS)


def _keys(keys: Mapping[str, OnlineKey]) -> str:
    lines = head("key", "TRL's default", "here", "")
    for name, key in keys.items():
        default = "none" if key.default is None else json.dumps(key.default)
        lines.append(
            row(f"`{name}`", default, "refused" if key.is_refused else "ignored", key.note)
        )
    return "\n".join(lines)


def _settings(*groups: type) -> str:
    lines = head("setting", "default", "")
    for group in groups:
        for one in settings_of(group).values():
            default = "needed" if one.is_required else json.dumps(one.default)
            default = "none" if default == "null" else default
            lines.append(row(f"`{one.name}`", default, one.sentence))
    return "\n".join(lines)


def _metrics(metrics: Sequence[Metric]) -> str:
    lines = head("metric", "meaning", "unit", "when")
    lines += [row(f"`{one.name}`", one.meaning, one.unit, one.when) for one in metrics]
    return "\n".join(lines)


PARTS = {
    "reward_settings": reward_settings,
    "online_settings": online_settings,
    "critic_settings": critic_settings,
    "ocrm_settings": ocrm_settings,
    "reward_metrics": reward_metrics,
    "online_metrics": online_metrics,
    "online_keys": online_keys,
    "ppo_keys": ppo_keys,
}
