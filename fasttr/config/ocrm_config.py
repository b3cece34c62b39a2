"""The configuration of off-policy-corrected reward modelling: stages of a reward model and a policy
that follows it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttr.config.online_config import DEFAULTS, OnlineConfig
from fasttr.config.reward_config import RewardConfig
from fasttr.errors import FasttrError, did_you_mean
from fasttr.losses.ratios import NOTICE_TAU, RELEASE, RatioSettings
from fasttr.rollouts.rewards import check_source
from fasttr.settings import (
    REQUIRED,
    SEED,
    Range,
    above,
    at_least,
    between,
    check_ranges,
    one_of,
    setting,
    settings_of,
    whole,
)

ARMS = ("fixed", "unweighted", "weighted", "shuffled", "fresh")
OF_REWARD = "rm_"  # before a setting of the reward models
# What a stage sets itself.
OF_STAGES = (
    "model_name_or_path",
    "ref_model_name_or_path",
    "reward_model_name_or_path",
    "reward_funcs",
    "dataset_name",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "seed",
    "max_steps",
    "weight_column",
)


@dataclass(frozen=True)
class OcrmSettings:
    """Off-policy-corrected reward models."""

    model_name_or_path: str = setting(REQUIRED, None, "folder of the SFT policy, which writes")
    dataset_name: str = setting(
        REQUIRED, None, "rows with a prompt, to write pairs and to train on"
    )
    judge_dataset_name: str = setting(REQUIRED, None, "rows with a prompt, to judge on")
    arms: list[str] = setting(
        REQUIRED,
        Range(f"some of {', '.join(ARMS)}", lambda x: bool(x) and set(x) <= set(ARMS)),
        "how reward models are updated: not at all, refitted with another seed, with density "
        "ratios, with ratios dealt out at random, or on new labels",
    )
    label: str = setting(
        "gold", None, "who labels and judges: gold, a function, or a folder of a reward model"
    )
    label_noise: float = setting(
        0.0,
        at_least(0),
        "P(first) = s(difference / noise); 0 takes the better one, ties are dropped",
    )
    output_dir: str = setting(
        "runs/ocrm", None, "folder of the steps; those that are there are kept"
    )
    ref_reset: bool = setting(
        True, None, "the KL reference of a stage is the policy it starts from"
    )
    algorithm: str = setting("rloo", one_of("rloo", "grpo"), "how a policy is trained")
    stages: int = setting(3, whole(1), "stages of an arm")
    updates_per_stage: int = setting(195, whole(1), "optimizer steps of a stage's policy")
    pairs: int = setting(1000, whole(2), "pairs that the SFT policy writes")
    pairs_per_prompt: int = setting(1, whole(1), "of them of one prompt")
    ratio_alpha: float = setting(0.1, between(0, 1), "of the relative ratio; 0 is the plain one")
    ratio_tau: float = setting(1.0, between(0, 1), "exponent that flattens the ratios")
    ratio_min_ess: float = setting(
        0.1,
        between(0, 1),
        "share of the pairs that the effective size is kept above, by lowering tau",
    )
    ratio_clip: float | None = setting(
        None, None, "largest log-weight of a pair, before flattening"
    )
    ratio_preset: str | None = setting(
        None, one_of("ocrm-release"), "ocrm-release: tau 0.001 and no floor, as released"
    )
    ratio_temperature: float = setting(
        1.0, above(0), "of the log-probs of the ratios, on both sides"
    )
    stop_ess: float = setting(
        100, at_least(0), "an arm stops where its weights are worth fewer pairs than this"
    )
    judge_samples: int = setting(2, whole(2), "completions of a prompt that are judged")
    seed: int = setting(42, SEED, "seed of everything random")
    use_cpu: bool = setting(False, None, "run on the CPU even when there is a GPU")


@dataclass(frozen=True, kw_only=True)
class OcrmConfig(OcrmSettings):
    """Settings of `fasttr ocrm`: its own, those of a policy's training, and with rm_ before them
    those of reward models."""

    rl: dict[str, Any] = field(default_factory=dict)  # of OnlineConfig
    rm: dict[str, Any] = field(default_factory=dict)  # of RewardConfig

    def __post_init__(self) -> None:
        check_ranges(_own(self))
        check_source(self.label)
        _check_names(self.rl, settings_of(OnlineConfig), "")
        _check_names(self.rm, settings_of(RewardConfig), OF_REWARD)
        # Mistakes in them are said before anything is drawn.
        self.policy(Path("policy"), self.model_name_or_path, None, "gold", 0)
        self.reward(Path("reward"), 0)

    @property
    def ratios(self) -> RatioSettings:
        if self.ratio_preset is not None:
            return RELEASE
        return RatioSettings(self.ratio_alpha, self.ratio_tau, self.ratio_min_ess, self.ratio_clip)

    @property
    def flattens_much(self) -> bool:
        return self.ratios.tau < NOTICE_TAU

    def policy(
        self, folder: Path, start: str, reference: str | None, reward: str, seed: int
    ) -> OnlineConfig:
        """How the policy of a stage is trained, into `folder`."""
        values = {**DEFAULTS[self.algorithm], **self.rl}
        return OnlineConfig(
            **values,
            model_name_or_path=start,
            ref_model_name_or_path=reference,
            reward_funcs=[reward],
            dataset_name=self.dataset_name,
            output_dir=str(folder),
            resume_from_checkpoint=True,
            max_steps=self.updates_per_stage,
            seed=seed,
            use_cpu=self.use_cpu,
        )

    def reward(self, folder: Path, seed: int) -> RewardConfig:
        """How a reward model is trained, into `folder`."""
        return RewardConfig(
            **{"num_train_epochs": 1.0, **self.rm},
            model_name_or_path=self.model_name_or_path,
            output_dir=str(folder),
            resume_from_checkpoint=True,
            weight_column="weight",
            seed=seed,
            use_cpu=self.use_cpu,
        )

    def sampling(self) -> dict[str, Any]:
        """What of the policies' settings says how completions are drawn."""
        defaults = settings_of(OnlineConfig)
        names = ("max_completion_length", "temperature", "sampling_batch_size")
        return {name: self.rl.get(name, defaults[name].default) for name in names}


def _own(config: OcrmConfig) -> OcrmSettings:
    values = {one.name: getattr(config, one.name) for one in dataclasses.fields(OcrmSettings)}
    return OcrmSettings(**values)


def _check_names(values: dict[str, Any], known: Any, before: str) -> None:
    for name in values:
        if name in OF_STAGES:
            raise FasttrError(
                f"{before}{name}: got {values[name]!r}; a stage sets it: leave it out"
            )
        if name not in known:
            raise FasttrError(f"unknown key {before + name!r}{did_you_mean(name, known)}")
