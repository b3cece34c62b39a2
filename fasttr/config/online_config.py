"""The configuration of on-policy training: `fasttr grpo` and `fasttr rloo`. One set of settings; a
command sets defaults. Names are TRL's where the meaning is TRL's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fasttr.config.train_config import LossSettings, TrainConfig
from fasttr.config.watching import SampleSettings
from fasttr.errors import FasttrError
from fasttr.losses import Loss
from fasttr.losses.policy_gradient import LEVELS, LOSS_TYPES, PolicyLoss
from fasttr.rollouts.rewards import check_source
from fasttr.settings import (
    Range,
    above,
    at_least,
    described,
    one_of,
    setting,
    settings_of,
    whole,
)

TWO_NUMBERS = Range(
    "two numbers, low and high",
    lambda x: isinstance(x, list) and len(x) == 2 and x[0] < x[1],
)


@dataclass(frozen=True)
class PolicySettings:
    """Policy loss."""

    loss_type: str = setting("dapo", one_of(*(x for x in LOSS_TYPES if x != "ppo")), "policy loss")
    beta: float = setting(
        0.0, at_least(0), "weight of the KL to the reference: in the loss, with rloo in the reward"
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
        "divides by nothing",
    )
    normalize_advantages: bool = setting(
        False, None, "rloo: advantages of a rollout with mean 0 and deviation 1"
    )
    num_iterations: int = setting(1, whole(1), "passes over a rollout")


@dataclass(frozen=True)
class RolloutSettings:
    """Rollouts."""

    learning_rate: float = setting(1e-6, at_least(0), "peak rate of AdamW")
    num_generations: int = setting(8, whole(2), "completions of a prompt; at least 2, a baseline")
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
    mask_truncated_completions: bool = setting(
        False, None, "leave completions that did not end out of the loss"
    )


@dataclass(frozen=True)
class OnlineConfig(RewardSourceSettings, RolloutSettings, PolicySettings, TrainConfig):  # type: ignore[misc]
    """Settings of on-policy training: `fasttr grpo` and `fasttr rloo`."""

    def __post_init__(self) -> None:
        own = set(settings_of(PolicySettings))
        defaults = settings_of(TrainConfig)
        for name in FOREIGN:
            if name not in own and getattr(self, name) != defaults[name].default:
                raise FasttrError(
                    f"{name}: got {getattr(self, name)!r}; runs on rollouts do not read it: leave "
                    "it out"
                )
        if isinstance(self.reward_funcs, str):
            object.__setattr__(self, "reward_funcs", [self.reward_funcs])
        self._check_batches()
        self._check_rewards()
        if self.ref_update != "none" and self.beta == 0:
            raise FasttrError(
                f"ref_update: got {self.ref_update} with beta 0, which reads no reference; wanted "
                "a beta above 0"
            )
        super().__post_init__()

    def _check_batches(self) -> None:
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
        steps = of_epoch * self.steps_per_generation * self.num_iterations
        return math.ceil(self.num_train_epochs * steps)


# Settings of a run on preferences that mean nothing here, or something else.
FOREIGN = [*settings_of(LossSettings), *settings_of(SampleSettings)]
OnlineConfig.__doc__ = described(OnlineConfig)
# What a command sets where nothing is said.
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "dapo", "num_generations": 8, "beta": 0.0},
    "rloo": {"loss_type": "rloo", "num_generations": 2, "beta": 0.05},
}
