"""The configuration of a run on a reward model: that of a run on preferences without its losses and
its reference. Names and defaults are those of TRL's RewardConfig."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fasttr.batch import TreeSource
from fasttr.config.losses import LossSettings, ReferenceSettings
from fasttr.config.train_config import TrainConfig
from fasttr.config.watching import SampleSettings
from fasttr.errors import FasttrError
from fasttr.losses import Loss
from fasttr.losses.reward import RewardLoss, RewardObjective, reward_loss
from fasttr.packing.plan import Plan, prompt_numbers
from fasttr.settings import at_least, described, one_of, setting, settings_of

# Settings of a run on preferences that mean nothing here.
FOREIGN = tuple(
    name
    for group in (LossSettings, ReferenceSettings, SampleSettings)
    for name in settings_of(group)
)


@dataclass(frozen=True)
class RewardSettings:
    """Reward model."""

    learning_rate: float = setting(1e-4, at_least(0), "peak rate of AdamW")
    train_sampling_strategy: str = setting(
        "random",
        one_of("random", "sequential", "prompt"),
        "order of the rows: TRL's permutation, that of the data, or prompts shuffled with the rows "
        "of one together, which then share it",
    )
    center_rewards_coefficient: float | None = setting(
        None,
        at_least(0),
        "weight of the squared sum of a row's scores, which keeps them around 0; none is 0",
        in_eval=True,
    )
    pad_token: str | None = setting(
        None,
        None,
        "padding token that the folder names; none takes the tokenizer's, or a special token that "
        "no row uses, and never EOS, behind which transformers would read the score",
    )
    calibration_dataset_name: str | None = setting(
        None,
        None,
        "responses that should score 0 on average (prompt and completion, or the chosen side of "
        "pairs); their mean is written beside the weights",
    )


@dataclass(frozen=True)
class RewardConfig(RewardSettings, TrainConfig):
    """Settings of a run on a reward model: `fasttr reward`."""

    def __post_init__(self) -> None:
        settings = settings_of(TrainConfig)
        for name in FOREIGN:
            if getattr(self, name) != settings[name].default:
                raise FasttrError(
                    f"{name}: got {getattr(self, name)!r}; a reward model has no loss to choose, "
                    "no reference and no samples: leave it out"
                )
        super().__post_init__()

    @property
    def loss_names(self) -> list[str]:
        return ["bradley_terry"]

    @property
    def loss(self) -> Loss:
        return self.loss_of(2)  # type: ignore[return-value]  # it reads scores in place of log-probs

    def loss_of(self, completions: int) -> RewardLoss:
        """The loss of rows with so many completions."""
        return reward_loss(completions, self.center_rewards_coefficient)

    def reward_objective(self, completions: int) -> RewardObjective:
        return RewardObjective(self.loss_of(completions))

    def plan(self, trees: TreeSource, loss: Loss, device: torch.device) -> Plan:
        plan = super().plan(trees, loss, device)
        if self.train_sampling_strategy != "prompt":
            return plan
        return dataclasses.replace(plan, prompts=prompt_numbers(trees))


RewardConfig.__doc__ = described(RewardConfig)


def shown_settings() -> dict[str, object]:
    """The settings that a run on a reward model reads."""
    return {name: one for name, one in settings_of(RewardConfig).items() if name not in FOREIGN}
