"""Which checkpoint is the best, by one metric of the evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fasttr.config.train_config import TrainConfig
from fasttr.errors import FasttrError


@dataclass
class Best:
    """The best evaluation so far among those that count."""

    metric: str  # key of an evaluation
    more_is_better: bool
    saves_itself: bool  # save_strategy best: an improvement is saved; else saved steps alone count
    value: float | None = None
    step: int | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Best | None:
        """None for a run that asks for no best checkpoint."""
        saves_itself = config.save_strategy == "best"
        if not config.load_best_model_at_end and not saves_itself:
            return None
        return cls(config.best_metric, config.more_is_better, saves_itself)

    def note(self, evaluation: dict[str, float], step: int) -> bool:
        """Take up an evaluation; whether it is the best so far. NaN never is."""
        value = value_of(evaluation, self.metric)
        if math.isnan(value) or (self.value is not None and not self._is_better(value, self.value)):
            return False
        self.value, self.step = value, step
        return True

    def _is_better(self, value: float, than: float) -> bool:
        return value > than if self.more_is_better else value < than


def value_of(evaluation: dict[str, float], metric: str) -> float:
    """One metric of an evaluation. FasttrError when it has none of that name."""
    if metric not in evaluation:
        known = ", ".join(key for key in evaluation if not key.endswith("stderr"))
        raise FasttrError(
            f"metric_for_best_model: {metric} is not in this evaluation; wanted of {known}"
        )
    return evaluation[metric]
