"""The configuration of on-policy training: `fasttr grpo`, `fasttr rloo` and `fasttr ppo`. One set
of settings; a command sets defaults. Names are TRL's where the meaning is TRL's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttr.config.losses import LossSettings
from fasttr.config.train_config import TrainConfig
from fasttr.config.watching import SampleSettings
from fasttr.errors import FasttrError
from fasttr.losses import Loss
from fasttr.losses.advantages import KL_ESTIMATORS
from fasttr.losses.policy_gradient import LEVELS, LOSS_TYPES, PolicyLoss
from fasttr.rollouts.rewards import check_source
from fasttr.settings import (
    Range,
    above,
    at_least,
    between,
    described,
    one_of,
    setting,
    settings_of,
    whole,
)

# TRL's truth values of scale_rewards, and their words.
SCALES = {True: "group", False: "none", "true": "group", "false": "none"}
TWO_NUMBERS = Range(
    "two numbers, low and high",
    lambda x: isinstance(x, list) and len(x) == 2 and x[0] < x[1],
)


@dataclass(frozen=True)
class PolicySettings:
    """Policy loss."""

    loss_type: str = setting("dapo", one_of(*LOSS_TYPES), "policy loss")
    beta: float = setting(
        0.0,
        at_least(0),
        "weight of the KL to the reference: in the loss, with rloo and ppo in the reward",
    )
    epsilon: float = setting(0.2, above(0), "clip range of the ratio, below 1 and above it")
    epsilon_high: float | None = setting(
        None, above(0), "clip range above 1; none means epsilon. cispo: the largest ratio"
    )
    delta: float | None = setting(None, above(1), "upper bound of the ratio on both sides")
    importance_sampling_level: str = setting(
        "token", one_of(*LEVELS), "a ratio for each token, or one for each completion"
    )
    use_bias_correction_kl: bool = setting(True, None, "multiply the KL estimate by the ratio")
    scale_rewards: str = setting(
        "group",
        one_of("group", "batch", "none"),
        "what an advantage is divided by: the deviation of its prompt, of all, or nothing; rloo "
        "and ppo do not read it",
    )
    normalize_advantages: bool = setting(
        False, None, "rloo: advantages of a rollout with mean 0 and deviation 1"
    )
    num_iterations: int = setting(1, whole(1), "passes over a rollout")


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts."""

    learning_rate: float = setting(1e-6, at_least(0), "peak rate of AdamW")
    num_generations: int = setting(
        8, whole(1), "completions of a prompt; at least 2, a baseline, but for ppo"
    )
    steps_per_generation: int = setting(
        1, whole(1), "optimizer steps that one rollout feeds in a pass"
    )
    max_completion_length: int = setting(512, whole(1), "most tokens of a completion")
    temperature: float = setting(1.0, above(0), "of sampling, and of the log-probs trained on")
    sampling_batch_size: int = setting(32, whole(1), "prompts drawn for at once", may_change=True)
    shuffle_dataset: bool = setting(True, None, "shuffle the prompts of every epoch")


@dataclass(frozen=True)
class RewardSourceSettings:
    """Rewards."""

    reward_model_name_or_path: str | None = setting(
        None, None, "folder of a reward model; one of reward_funcs"
    )
    reward_funcs: list[str] | str | None = setting(
        None,
        None,
        "folders, functions (module:function or a dotted path, TRL's signature) or gold, the "
        "generated task's own",
    )
    reward_weights: list[float] | None = setting(None, None, "weight of each source; none means 1")
    reward_clip_range: list[float] | None = setting(None, TWO_NUMBERS, "bounds of the sum")
    missing_eos_score: float | None = setting(
        None, None, "reward of a completion that did not end, in place of its own"
    )
    missing_eos_penalty: float | None = setting(
        None, None, "taken off the reward of a completion that did not end"
    )
    mask_truncated_completions: bool = setting(
        False, None, "leave completions that did not end out of the loss"
    )


@dataclass(frozen=True)
class CriticSettings:
    """Critic of ppo."""

    value_model_name_or_path: str | None = setting(
        None,
        None,
        "folder that the critic starts from, with a reward model or with a new head; none means "
        "the first folder among the rewards, else the policy",
    )
    vf_coef: float = setting(0.1, above(0), "weight of the critic's loss")
    cliprange_value: float = setting(
        0.2, above(0), "how far a value counts as moved since its completion was drawn"
    )
    gamma: float = setting(1.0, between(0, 1), "discount a token")
    lam: float = setting(0.95, between(0, 1), "decay of the advantages' sum (GAE)")
    whiten_rewards: bool = setting(
        False, None, "token rewards of a rollout with deviation 1, their mean kept"
    )
    kl_estimator: str = setting(
        "k1", one_of(*KL_ESTIMATORS), "of the KL in the reward: the log-ratio, or k3, never below 0"
    )
    kl_target: float | None = setting(
        None, above(0), "nats a completion that beta follows; none: beta stays"
    )
    kl_horizon: float = setting(
        10_000.0, above(0), "completions in which beta makes up for a KL that is off by all of it"
    )


@dataclass(frozen=True)
class OnlineConfig(  # type: ignore[misc]
    CriticSettings, RewardSourceSettings, RolloutSettings, PolicySettings, TrainConfig
):
    """Settings of on-policy training: `fasttr grpo`, `fasttr rloo` and `fasttr ppo`."""

    def __post_init__(self) -> None:
        own = set(settings_of(PolicySettings))
        defaults = settings_of(TrainConfig)
        for name in FOREIGN:
            if name not in own and getattr(self, name) != defaults[name].default:
                raise FasttrError(
                    f"{name}: got {getattr(self, name)!r}; runs on rollouts do not read it: leave "
                    "it out"
                )
        scale = SCALES.get(self.scale_rewards, self.scale_rewards)
        object.__setattr__(self, "scale_rewards", scale)
        if isinstance(self.reward_funcs, str):
            object.__setattr__(self, "reward_funcs", [self.reward_funcs])
        self._check_batches()
        self._check_rewards()
        self._check_method()
        if self.ref_update != "none" and self.beta == 0:
            raise FasttrError(
                f"ref_update: got {self.ref_update} with beta 0, which reads no reference; wanted "
                "a beta above 0"
            )
        super().__post_init__()

    def _check_method(self) -> None:
        """What only another method reads is refused."""
        unread = UNREAD_BY_PPO if self.is_ppo else tuple(settings_of(CriticSettings))
        known = settings_of(OnlineConfig)
        for name in unread:
            if getattr(self, name) != known[name].default:
                told = "ppo does not read it" if self.is_ppo else "only fasttr ppo has a critic"
                raise FasttrError(f"{name}: got {getattr(self, name)!r}; {told}: leave it out")
        if self.kl_target is not None and self.beta == 0:
            raise FasttrError("kl_target: got it with beta 0, which it could not lead; raise beta")

    def _check_batches(self) -> None:
        if self.num_generations < 2 and not self.is_ppo:
            raise FasttrError(
                f"num_generations: got {self.num_generations}; wanted a whole number from 2: the "
                "others of a prompt are the baseline"
            )
        if self.train_batch_size % self.num_generations:
            raise FasttrError(
                f"train_batch_size: got {self.train_batch_size} completions a step; wanted a "
                f"multiple of num_generations {self.num_generations}"
            )
        if self.eval_strategy != "no" or self.eval_on_start:
            raise FasttrError(
                "eval_strategy: a run on rollouts has no split to evaluate on; judge its "
                "checkpoints instead: leave it out"
            )

    def _check_rewards(self) -> None:
        names = self.reward_names
        if not names:
            raise FasttrError(
                "reward_funcs: missing; wanted a folder with a reward model, a function "
                "(module:function), or gold"
            )
        weights = self.reward_weights
        if weights is not None and len(weights) != len(names):
            raise FasttrError(
                f"reward_weights: got {len(weights)} for {len(names)} sources; wanted one for each"
            )
        if self.missing_eos_score is not None and self.missing_eos_penalty is not None:
            raise FasttrError(
                "missing_eos_penalty: got it beside missing_eos_score, which takes the place of "
                "the reward; leave one of them out"
            )
        for name in names:
            check_source(name)

    @property
    def reward_names(self) -> list[str]:
        """The sources of rewards, the folder first."""
        folder = self.reward_model_name_or_path
        named = [folder] if folder is not None else []
        return [*named, *(self.reward_funcs or [])]

    @property
    def is_rloo(self) -> bool:
        return self.loss_type == "rloo"

    @property
    def is_ppo(self) -> bool:
        return self.loss_type == "ppo"

    @property
    def rewards_closeness(self) -> bool:
        """Whether the KL to the reference is taken off the reward."""
        return self.beta > 0 and (self.is_rloo or self.is_ppo)

    @property
    def steps_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @property
    def value_source(self) -> str:
        """The folder that a critic starts from."""
        if self.value_model_name_or_path is not None:
            return self.value_model_name_or_path
        folders = [name for name in self.reward_names if Path(name).is_dir()]
        return folders[0] if folders else str(self.model_name_or_path)

    @property
    def loss_names(self) -> list[str]:
        return [self.loss_type]

    @property
    def policy_loss(self) -> PolicyLoss:
        return PolicyLoss(
            loss_type=self.loss_type,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            importance_sampling_level=self.importance_sampling_level,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            max_completion_length=self.max_completion_length,
        )

    @property
    def loss(self) -> Loss:
        return self.policy_loss  # type: ignore[return-value]  # it reads token log-probs

    @property
    def prompts_per_step(self) -> int:
        return self.train_batch_size // self.num_generations

    def total_steps(self, prompts: int) -> int:
        if self.max_steps > 0:
            return self.max_steps
        of_epoch = prompts // (self.prompts_per_step * self.steps_per_generation)
        steps = of_epoch * self.steps_per_rollout
        return math.ceil(self.num_train_epochs * steps)


# Settings of a run on preferences that mean nothing here, or something else.
FOREIGN = [*settings_of(LossSettings), *settings_of(SampleSettings)]
UNREAD_BY_PPO = (
    "scale_rewards",
    "normalize_advantages",
    "importance_sampling_level",
    "use_bias_correction_kl",
)
OnlineConfig.__doc__ = described(OnlineConfig)
# What a command sets where nothing is said.
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "dapo", "num_generations": 8, "beta": 0.0},
    "rloo": {"loss_type": "rloo", "num_generations": 2, "beta": 0.05},
    "ppo": {"loss_type": "ppo", "num_generations": 1, "beta": 0.05, "num_iterations": 4},
}
