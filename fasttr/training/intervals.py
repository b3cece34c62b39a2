"""When a run logs, evaluates and saves: pure functions of configuration, plan and step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fasttr.config.train_config import TrainConfig
from fasttr.packing.plan import Plan


@dataclass(frozen=True)
class Interval:
    """Every so many steps, every epoch, or never."""

    strategy: str  # steps, epoch; anything else is never
    every: float  # steps; below 1 a share of all of them

    def is_due(self, step: int, plan: Plan) -> bool:
        """After `step` optimizer steps."""
        if self.strategy == "epoch":
            return step % plan.steps_per_epoch == 0
        if self.strategy != "steps":
            return False
        share = self.every < 1
        every = math.ceil(self.every * plan.total_steps) if share else int(self.every)
        return step % every == 0


@dataclass(frozen=True)
class Intervals:
    """Answers for the state after `step` optimizer steps."""

    plan: Plan
    logging: Interval
    evaluation: Interval
    saving: Interval
    logs_first_step: bool
    eval_delay: float  # steps, or epochs

    @classmethod
    def of(cls, config: TrainConfig, plan: Plan) -> Intervals:
        return cls(
            plan,
            logging=Interval(config.logging_strategy, config.logging_steps),
            evaluation=Interval(config.eval_strategy, config.eval_every),
            saving=Interval(config.save_strategy, config.save_steps),
            logs_first_step=config.logging_first_step,
            eval_delay=config.eval_delay,
        )

    def logs(self, step: int) -> bool:
        if step == 1 and self.logs_first_step:
            return True
        is_last = self._is_last(step) and self.logging.strategy != "no"
        return is_last or self.logging.is_due(step, self.plan)

    def evaluates(self, step: int) -> bool:
        by_epoch = self.evaluation.strategy == "epoch"
        done = step / self.plan.steps_per_epoch if by_epoch else step
        if done < self.eval_delay:
            return False
        # TRL also evaluates at the last step when eval_strategy is steps.
        is_last = self._is_last(step) and self.evaluation.strategy == "steps"
        return is_last or self.evaluation.is_due(step, self.plan)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due, whatever an evaluation says."""
        is_last = self._is_last(step) and self.saving.strategy in ("steps", "epoch")
        return is_last or self.saving.is_due(step, self.plan)

    def _is_last(self, step: int) -> bool:
        return step == self.plan.total_steps
