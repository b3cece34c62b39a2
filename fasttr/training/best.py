"""Which checkpoint is the best, by one metric of the evaluations, and when none gets better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fasttr.config.train_config import TrainConfig
from fasttr.console import counted
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


@dataclass
class Patience:
    """Ends a run whose metric has not improved for `evaluations` of them, as transformers'
    EarlyStoppingCallback does: by more than `threshold`, on the best of all evaluations so far."""

    metric: str
    more_is_better: bool
    evaluations: int
    threshold: float
    best: float | None = None
    waited: int = 0  # evaluations since the last one that counted

    @classmethod
    def of(cls, config: TrainConfig) -> Patience | None:
        """None for a run that is not stopped early."""
        if config.early_stopping_patience is None:
            return None
        return cls(
            config.best_metric,
            config.more_is_better,
            config.early_stopping_patience,
            config.early_stopping_threshold,
        )

    def is_over(self, evaluation: dict[str, float]) -> bool:
        """Take up an evaluation; whether the run should end. NaN never improves."""
        value = value_of(evaluation, self.metric)
        gain = math.inf
        if self.best is not None:
            gain = value - self.best if self.more_is_better else self.best - value
        improves = not math.isnan(value) and gain > self.threshold
        self.waited = 0 if improves else self.waited + 1
        # The best moves by less than the threshold too: many small gains are no progress.
        if not math.isnan(value) and gain > 0:
            self.best = value
        return self.waited >= self.evaluations

    def explained(self) -> str:
        waited = counted(self.waited, "evaluation")
        return f"{self.metric} has not improved on {self.best:.6g} for {waited}"


def value_of(evaluation: dict[str, float], metric: str) -> float:
    """One metric of an evaluation. FasttrError when it has none of that name."""
    if metric not in evaluation:
        known = ", ".join(key for key in evaluation if not key.endswith("stderr"))
        raise FasttrError(
            f"metric_for_best_model: {metric} is not in this evaluation; wanted one of {known}"
        )
    return evaluation[metric]
