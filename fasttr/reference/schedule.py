"""When the reference moves, and how far (arXiv:2404.09656)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fixed:
    """The reference never moves (DPO, IPO)."""

    every: None = None

    def updates(self, steps: int) -> int:
        """How many updates fire in a run of that many steps."""
        return 0

    def mean_age(self, steps: int) -> float:
        """Mean number of optimizer steps between the policy and what it is compared with."""
        return (steps - 1) / 2


@dataclass(frozen=True)
class Soft:
    """reference <- alpha policy + (1 - alpha) reference every `every` steps."""

    alpha: float = 0.6
    every: int = 512

    def updates(self, steps: int) -> int:
        return steps // self.every

    def mean_age(self, steps: int) -> float:
        """every (1 - alpha)/alpha + (every - 1)/2, its value in a long run.

        The first term is the mean age of the policies that the reference is an average of, at the
        moment of an update; the second that of the window since.
        """
        if self.alpha == 0 or steps < self.every:
            return (steps - 1) / 2
        return self.every * (1 - self.alpha) / self.alpha + (self.every - 1) / 2


@dataclass(frozen=True)
class Hard:
    """reference <- policy every `every` steps."""

    every: int = 512

    def updates(self, steps: int) -> int:
        return steps // self.every

    def mean_age(self, steps: int) -> float:
        return (min(self.every, steps) - 1) / 2


Schedule = Fixed | Soft | Hard
