"""What a loss reads and what it is: one number per row, from vectors of summed log-probs.

Legend: B rows, m completions of a row, n = m B completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor


class LossInputs(NamedTuple):
    """Rows with the log-probs of their m completions, row after row.

    A pair is (chosen, rejected); an unpaired row has its own completion first, then, for `kto`, a
    mismatched one.
    """

    logp: Tensor  # (n,) policy, summed over completion tokens, nats
    ref_logp: Tensor | None  # (n,) reference; None for a loss without one
    token_counts: Tensor  # (n,) completion tokens
    completions: int = 2  # m
    labels: Tensor | None = None  # (B,) bool, of unpaired rows: desirable or not
    chosen_tokens_mean: Tensor | float = 1.0  # (B,) where `sft` averages over tokens
    whole_logp: Tensor | None = None  # (n,) `logp` as it is without ld_alpha; None: the same
    # name -> (n,) numbers that came with the rows, and the means that `head_means` asks for
    per_completion: Mapping[str, Tensor] = {}

    @property
    def chosen_logp(self) -> Tensor:  # (B,)
        return self.logp[:: self.completions]

    @property
    def rejected_logp(self) -> Tensor:  # (B,)
        return self.logp[1 :: self.completions]

    @property
    def whole_chosen_logp(self) -> Tensor:  # (B,)
        whole_logp = self.logp if self.whole_logp is None else self.whole_logp
        return whole_logp[:: self.completions]

    @property
    def logratio(self) -> Tensor:  # (n,)
        return self.logp - self.reference

    @property
    def chosen_logratio(self) -> Tensor:  # (B,)
        return self.logratio[:: self.completions]

    @property
    def rejected_logratio(self) -> Tensor:
        """(B,); of an unpaired row that of its mismatched completion."""
        return self.logratio[1 :: self.completions]

    @property
    def ref_margin(self) -> Tensor:
        """(B,) chosen minus rejected under the reference."""
        return self.reference[:: self.completions] - self.reference[1 :: self.completions]

    @property
    def chosen_tokens(self) -> Tensor:  # (B,)
        return self.token_counts[:: self.completions]

    @property
    def rejected_tokens(self) -> Tensor:  # (B,)
        return self.token_counts[1 :: self.completions]

    @property
    def reference(self) -> Tensor:
        """(n,) the reference's log-probs. ValueError where the loss was given none."""
        if self.ref_logp is None:
            raise ValueError(
                "got no ref_logp; wanted the reference's log-probs, since this loss compares with "
                "it"
            )
        return self.ref_logp


Scored = LossInputs  # its former name, for one release


class Loss(Protocol):
    """Anything that makes one number per row of `LossInputs`, and says what it reads."""

    @property
    def beta(self) -> float:
        """Logged rewards are beta times the log-ratio."""
        ...

    @property
    def needs_reference(self) -> bool: ...

    @property
    def completions(self) -> int:
        """How many completions of a row it reads."""
        ...

    @property
    def unpaired(self) -> bool:
        """Rows have a label instead of a rejected side."""
        ...

    @property
    def coupled(self) -> bool:
        """A row's loss depends on the other rows of its group."""
        ...

    @property
    def averages_tokens(self) -> bool:
        """It reads `chosen_tokens_mean`."""
        ...

    @property
    def head_means(self) -> Sequence[str]:
        """Statistics of the head (`loss_reads` of `fasttr_kernels.linear_preference_loss`) whose
        means over a completion's tokens it finds in `per_completion`, without gradient."""
        ...

    def __call__(self, inputs: LossInputs) -> Tensor: ...  # (B,)


@dataclass(frozen=True)
class BaseLoss:
    """What losses of pairs with a reference have in common.

    Subclasses are frozen dataclasses of their settings, with the equation in their docstring.
    """

    beta: float = 0.1
    needs_reference: ClassVar[bool] = True
    completions: ClassVar[int] = 2
    unpaired: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    averages_tokens: ClassVar[bool] = False
    head_means: ClassVar[Sequence[str]] = ()

    def __call__(self, inputs: LossInputs) -> Tensor:
        raise TypeError(f"{type(self).__name__} is a base of losses; wanted one of them")


@dataclass(frozen=True)
class WeightedSum:
    """Several losses on the same pairs: the sum of weight x loss."""

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]

    @property
    def beta(self) -> float:
        return self.losses[0].beta

    @property
    def needs_reference(self) -> bool:
        return any(loss.needs_reference for loss in self.losses)

    @property
    def completions(self) -> int:
        return max(loss.completions for loss in self.losses)

    @property
    def unpaired(self) -> bool:
        return False

    @property
    def coupled(self) -> bool:
        return any(loss.coupled for loss in self.losses)

    @property
    def averages_tokens(self) -> bool:
        return any(loss.averages_tokens for loss in self.losses)

    @property
    def head_means(self) -> Sequence[str]:
        return sorted({name for loss in self.losses for name in loss.head_means})

    def __call__(self, inputs: LossInputs) -> Tensor:
        total = self.weights[0] * self.losses[0](inputs)
        for weight, loss in zip(self.weights[1:], self.losses[1:], strict=True):
            total = total + weight * loss(inputs)
        return total


@dataclass(frozen=True)
class Wpo:
    """A loss of pairs whose rows are weighed by how likely the policy itself is to write them, as
    in WPO (arXiv:2406.11827, as TRL's `use_weighting`): exp of the mean over a side's tokens of
    log p(token) - log sum_v p(v)^2, chosen times rejected, without gradient and not normalised."""

    loss: Loss
    max_weight: float | None = None  # of a pair; None bounds nothing
    unpaired: ClassVar[bool] = False
    coupled: ClassVar[bool] = False
    averages_tokens: ClassVar[bool] = False
    head_means: ClassVar[Sequence[str]] = ("token_logp", "log_sum_squares")

    @property
    def beta(self) -> float:
        return self.loss.beta

    @property
    def needs_reference(self) -> bool:
        return self.loss.needs_reference

    @property
    def completions(self) -> int:
        return self.loss.completions

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.weights(inputs) * self.loss(inputs)

    def weights(self, inputs: LossInputs) -> Tensor:
        """(B,) of the rows."""
        means = inputs.per_completion
        aligned = means["token_logp"] - means["log_sum_squares"]
        weights = aligned.view(-1, inputs.completions).sum(dim=1).exp()
        return weights if self.max_weight is None else weights.clamp(max=self.max_weight)


@dataclass(frozen=True)
class CustomLoss:
    """Any function of `LossInputs` as a `Loss`: of pairs, with a reference, unless it says else."""

    function: Callable[[LossInputs], Tensor]
    beta: float = 0.1
    needs_reference: bool = True
    completions: int = 2
    unpaired: bool = False
    coupled: bool = False
    averages_tokens: bool = False
    head_means: Sequence[str] = ()

    def __call__(self, inputs: LossInputs) -> Tensor:
        return self.function(inputs)


TRAITS = (
    "beta",
    "needs_reference",
    "completions",
    "unpaired",
    "coupled",
    "averages_tokens",
    "head_means",
)


def as_loss(candidate: Callable[[LossInputs], Tensor], beta: float = 0.1) -> Loss:
    """`candidate` itself where it says all that a `Loss` says, else completed by defaults."""
    said = {name: getattr(candidate, name) for name in TRAITS if hasattr(candidate, name)}
    if len(said) == len(TRAITS):
        return candidate  # type: ignore[return-value]
    return CustomLoss(candidate, **{"beta": beta, **said})
