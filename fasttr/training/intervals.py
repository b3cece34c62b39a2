"""When a run logs, evaluates and saves: pure functions of the configuration, the plan and the
step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fasttr.config.train_config import TrainConfig
from fasttr.packing.plan import Plan


@dataclass(frozen=True)
class Cadence:
    """Answers for the state after `step` optimizer steps. A number of steps below 1 is a share of
    all of them."""

    config: TrainConfig
    plan: Plan

    def logs(self, step: int) -> bool:
        c = self.config
        if c.logging_strategy == "no":
            return step == 1 and c.logging_first_step
        last = step == self.plan.total_steps
        return (
            last
            or (step == 1 and c.logging_first_step)
            or self._due(step, c.logging_strategy, c.logging_steps)
        )

    def evaluates(self, step: int) -> bool:
        c = self.config
        begun = step / self.plan.steps_per_epoch if c.eval_strategy == "epoch" else step
        last = step == self.plan.total_steps and c.eval_strategy == "steps"  # as TRL
        return begun >= c.eval_delay and (
            last or self._due(step, c.eval_strategy, c.eval_steps or c.logging_steps)
        )

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due, whatever an evaluation says."""
        c = self.config
        last = step == self.plan.total_steps and c.save_strategy in ("steps", "epoch")
        return last or self._due(step, c.save_strategy, c.save_steps)

    def _due(self, step: int, strategy: str, every: float) -> bool:
        if strategy == "steps":
            return (
                step % (math.ceil(every * self.plan.total_steps) if every < 1 else int(every)) == 0
            )
        return strategy == "epoch" and step % self.plan.steps_per_epoch == 0
