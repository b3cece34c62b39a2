"""The configuration of off-policy-corrected reward modelling: stages of a reward model and a policy
that follows it, and the methods that it is compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.config.online_config import DEFAULTS, UNREAD_BY_PPO, OnlineConfig
from fasttr.config.reward_config import RewardConfig
from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError, did_you_mean
from fasttr.losses.ratios import NOTICE_TAU, RELEASE, RatioSettings
from fasttr.rollouts.rewards import check_source, load_function
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

UPDATES = ("fixed", "unweighted", "weighted", "shuffled", "fresh", "synthetic")
STAYS = "@sft"  # behind an update: the reference stays at the SFT policy
BASELINES = ("ppo-rlhf", "dpo", "wpo")
ARMS = (*UPDATES, *(name + STAYS for name in UPDATES), *BASELINES)
# Before a setting of reward models, of the arm ppo-rlhf, and of dpo and wpo.
OF_REWARD, OF_PPO, OF_DPO = "rm_", "ppo_", "dpo_"
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
    "weight_column",
)
OF_ROLLOUTS = (*OF_STAGES, "max_steps")
OF_PAIRS = (*OF_STAGES, "loss_type", "use_weighting")
# Settings of the stages' policies that the arm ppo-rlhf does not take over.
_NOT_OF_PPO = (*UNREAD_BY_PPO, "loss_type", "num_generations", "num_iterations")


class Arm(NamedTuple):
    """How the reward models of an arm are updated, and its policies' reference."""

    name: str  # as it was asked for
    update: str  # of UPDATES or of BASELINES
    resets: bool  # the reference of a stage is the policy that it starts from


class PolicyRun(NamedTuple):
    """What tells the trainings of an arm's policies apart."""

    rollouts: int
    resets: bool = True
    of_ppo: bool = False  # the arm ppo-rlhf


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
        "ratios, with ratios dealt out at random, on new labels, or with pairs on which the "
        "policy's samples agree; behind @sft the reference stays at SFT; or a baseline",
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
        True,
        None,
        "the KL reference of a stage is the policy it starts from; false: all arms have @sft",
    )
    sft_beta: float | None = setting(
        None, above(0), "beta where the reference stays at SFT; none means beta"
    )
    algorithm: str = setting("rloo", one_of("rloo", "grpo", "ppo"), "how a policy is trained")
    stages: int = setting(3, whole(1), "stages of an arm")
    updates_per_stage: int = setting(195, whole(1), "rollouts that a stage's policy takes")
    pairs_dataset_name: str | None = setting(
        None,
        None,
        "pairs that the SFT policy wrote and somebody labelled, at pairs_temperature; none: it "
        "writes them, and label labels",
    )
    pairs: int = setting(1000, whole(2), "pairs that the SFT policy writes")
    pairs_per_prompt: int = setting(1, whole(1), "of them of one prompt")
    pairs_temperature: float | None = setting(
        None, above(0), "at which pairs are written; none means temperature, the policies' own"
    )
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
    ratio_tokens: int | None = setting(
        None, whole(1), "a ratio is of a completion's first so many tokens; none: of all"
    )
    stop_ess: float = setting(
        100, at_least(0), "an arm stops where its weights are worth fewer pairs than this"
    )
    synthetic_samples: int = setting(10, whole(2), "samples of a prompt that may agree")
    synthetic_share: float = setting(
        0.5, between(0, 1), "a prompt counts where more than this share of them agree"
    )
    cluster: str | None = setting(
        None,
        None,
        "module:function of a prompt and its samples' texts, equal labels for those that agree; "
        "none: equal texts",
    )
    judge_samples: int = setting(2, whole(2), "completions of a prompt that are judged")
    judge_temperature: float | None = setting(
        None, above(0), "at which samples are judged; none means temperature, the policies' own"
    )
    judge_controls: bool = setting(
        False,
        None,
        "where ratios are made, fit the unweighted and the shuffled reward model too and judge "
        "all of them on the policy's samples: the direct test of the weights",
    )
    seed: int = setting(42, SEED, "seed of everything random")
    use_cpu: bool = setting(False, None, "run on the CPU even when there is a GPU")


@dataclass(frozen=True, kw_only=True)
class OcrmConfig(OcrmSettings):
    """Settings of `fasttr ocrm`: its own, those of a policy's training, with rm_ before them those
    of reward models, with ppo_ and dpo_ those of the baselines."""

    rl: dict[str, Any] = field(default_factory=dict)  # of OnlineConfig
    rm: dict[str, Any] = field(default_factory=dict)  # of RewardConfig
    ppo: dict[str, Any] = field(default_factory=dict)  # of OnlineConfig
    dpo: dict[str, Any] = field(default_factory=dict)  # of TrainConfig

    def __post_init__(self) -> None:
        check_ranges(_own(self))
        check_source(self.label, "label")
        if self.cluster is not None:
            load_function(self.cluster, "cluster")
        _check_names(self.rl, settings_of(OnlineConfig), "", OF_ROLLOUTS)
        _check_names(self.rm, settings_of(RewardConfig), OF_REWARD, OF_ROLLOUTS)
        _check_names(self.ppo, settings_of(OnlineConfig), OF_PPO, OF_ROLLOUTS)
        _check_names(self.dpo, settings_of(TrainConfig), OF_DPO, OF_PAIRS)
        self._check_temperatures()
        # Mistakes in them are said before anything is drawn.
        for of_ppo in {False, "ppo-rlhf" in self.arms}:
            run = PolicyRun(1, of_ppo=of_ppo)
            self.policy(Path("policy"), self.model_name_or_path, None, "gold", 0, run)
        self.reward(Path("reward"), 0)
        self.preferences(Path("dpo"), 0, is_wpo=True)

    @property
    def all_arms(self) -> list[Arm]:
        found = []
        for name in self.arms:
            update = name.removesuffix(STAYS)
            resets = self.ref_reset and update == name and update not in BASELINES
            found.append(Arm(name, update, resets))
        return found

    @property
    def ratios(self) -> RatioSettings:
        if self.ratio_preset is not None:
            return RELEASE
        return RatioSettings(self.ratio_alpha, self.ratio_tau, self.ratio_min_ess, self.ratio_clip)

    @property
    def flattens_much(self) -> bool:
        return self.ratios.tau < NOTICE_TAU

    def policy_settings(self, run: PolicyRun) -> dict[str, Any]:
        """What a policy's training reads beside its start, its rewards and its seed."""
        if run.of_ppo:
            shared = {name: x for name, x in self.rl.items() if name not in _NOT_OF_PPO}
            values = {**DEFAULTS["ppo"], **shared, **self.ppo}
        else:
            values = {**DEFAULTS[self.algorithm], **self.rl}
        if not run.resets and self.sft_beta is not None:
            values["beta"] = self.sft_beta
        return values

    def policy(
        self,
        folder: Path,
        start: str,
        reference: str | None,
        reward: str,
        seed: int,
        run: PolicyRun,
    ) -> OnlineConfig:
        """How a policy is trained, into `folder`."""
        config = OnlineConfig(
            **self.policy_settings(run),
            model_name_or_path=start,
            ref_model_name_or_path=reference,
            reward_funcs=[reward],
            dataset_name=self.dataset_name,
            output_dir=str(folder),
            resume_from_checkpoint=True,
            seed=seed,
            use_cpu=self.use_cpu,
        )
        return dataclasses.replace(config, max_steps=run.rollouts * config.steps_per_rollout)

    def episodes(self, run: PolicyRun) -> int:
        """Completions that such a training draws."""
        config = self.policy(Path("policy"), self.model_name_or_path, None, "gold", 0, run)
        return run.rollouts * config.train_batch_size * config.steps_per_generation

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

    def preferences(self, folder: Path, seed: int, *, is_wpo: bool) -> TrainConfig:
        """How DPO or WPO trains on the pairs, into `folder`."""
        of_wpo = () if is_wpo else ("wpo_max_weight",)
        given = {name: x for name, x in self.dpo.items() if name not in of_wpo}
        return TrainConfig(
            **{"num_train_epochs": 1.0, **given},
            loss_type="sigmoid",
            use_weighting=is_wpo,
            model_name_or_path=self.model_name_or_path,
            output_dir=str(folder),
            resume_from_checkpoint=True,
            seed=seed,
            use_cpu=self.use_cpu,
        )

    def sampling(self, temperature: float | None) -> dict[str, Any]:
        """What of the policies' settings says how completions are drawn; `temperature` in place of
        theirs where it is given."""
        defaults = settings_of(OnlineConfig)
        names = ("max_completion_length", "temperature", "sampling_batch_size")
        found = {name: self.rl.get(name, defaults[name].default) for name in names}
        return found if temperature is None else {**found, "temperature": temperature}

    def _check_temperatures(self) -> None:
        """A ratio of log-probs is one of densities where pairs were written at its temperature."""
        written = self.sampling(self.pairs_temperature)["temperature"]
        reads_ratios = any(arm.update in ("weighted", "shuffled") for arm in self.all_arms)
        if reads_ratios and written != self.ratio_temperature:
            raise FasttrError(
                f"ratio_temperature: got {self.ratio_temperature}, and pairs are written at "
                f"{written}; wanted the same: give pairs_temperature or ratio_temperature"
            )


def _own(config: OcrmConfig) -> OcrmSettings:
    values = {one.name: getattr(config, one.name) for one in dataclasses.fields(OcrmSettings)}
    return OcrmSettings(**values)


def _check_names(values: dict[str, Any], known: Any, before: str, taken: tuple[str, ...]) -> None:
    for name in values:
        if name in taken:
            raise FasttrError(
                f"{before}{name}: got {values[name]!r}; a stage sets it: leave it out"
            )
        if name not in known:
            raise FasttrError(f"unknown key {before + name!r}{did_you_mean(name, known)}")
