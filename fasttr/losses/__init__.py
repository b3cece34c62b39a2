"""Preference losses: a dozen lines each, on vectors of summed log-probs, with torch alone.

    from fasttr.losses import LossInputs, Sigmoid
    inputs = LossInputs(logp, ref_logp, token_counts)   # completions: chosen, rejected, chosen, ...
    loss = Sigmoid(beta=0.1)(inputs)                    # (B,)

`make_loss` builds one from the names and settings of a configuration. Any function of `LossInputs`
is a loss; `as_loss` says for it what it does not say itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fasttr.errors import did_you_mean
from fasttr.losses.base import (
    BaseLoss,
    CustomLoss,
    Loss,
    LossInputs,
    Scored,
    WeightedSum,
    Wpo,
    as_loss,
)
from fasttr.losses.coupled import Aot, AotUnpaired, ApoZeroUnpaired, Kto, KtoPaired, kl_estimate
from fasttr.losses.objective import LossFn, Objective, StepObjective, group_loss
from fasttr.losses.pairs import (
    DIVERGENCES,
    ApoDown,
    ApoZero,
    BcoPair,
    Cdpo,
    Discopop,
    DivergenceLoss,
    ExoPair,
    Hinge,
    Ipo,
    IpoSum,
    NcaPair,
    Orpo,
    Robust,
    Sft,
    Sigmoid,
    SigmoidNorm,
    Simpo,
    SppoHard,
)

LOSSES: dict[str, type[BaseLoss]] = {
    "sigmoid": Sigmoid,
    "sigmoid_norm": SigmoidNorm,
    "hinge": Hinge,
    "ipo": Ipo,
    "ipo_sum": IpoSum,
    "cdpo": Cdpo,
    "robust": Robust,
    "exo_pair": ExoPair,
    "nca_pair": NcaPair,
    "bco_pair": BcoPair,
    "sppo_hard": SppoHard,
    "aot": Aot,
    "aot_unpaired": AotUnpaired,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "discopop": Discopop,
    "sft": Sft,
    "simpo": Simpo,
    "orpo": Orpo,
    "kto_paired": KtoPaired,
    "kto": Kto,
    "apo_zero_unpaired": ApoZeroUnpaired,
}

# What is meant by names that other tools, and older TRL, have.
OTHER_NAMES = {
    "dpo": "DPO is called sigmoid",
    "tr_dpo": "TR-DPO is sigmoid with ref_update: soft (or hard)",
    "tr-dpo": "TR-DPO is sigmoid with ref_update: soft (or hard)",
    "nll": "the likelihood of chosen completions is called sft",
    "slic": "SLiC is called hinge",
    "kto_pair": "KTO on pairs is called kto_paired, or fasttr kto takes pairs apart",
    "aot_pair": "it is called aot now",
    "bco": "TRL 1.16 has no bco for unpaired rows; bco_pair is for pairs",
    "sppo": "it is called sppo_hard",
    "exo": "it is called exo_pair",
    "nca": "it is called nca_pair",
}

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "BaseLoss",
    "CustomLoss",
    "Loss",
    "LossFn",
    "LossInputs",
    "Objective",
    "Scored",
    "StepObjective",
    "WeightedSum",
    "Wpo",
    "as_loss",
    "group_loss",
    "kl_estimate",
    "make_loss",
    *(cls.__name__ for cls in LOSSES.values()),
]


def make_loss(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    use_weighting: bool = False,
    wpo_max_weight: float | None = None,
    **settings: Any,
) -> Loss:
    """The loss of `loss_type` names and the settings of a configuration that it reads.

    With `use_weighting` its rows have WPO's weights. Raises ValueError (got, wanted) on an unknown
    name, on weights that do not match, on unpaired losses in a list, on a loss that WPO cannot
    weigh by row, and on a setting that none of the named losses reads although it differs from its
    default.
    """
    classes = _classes(names)
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"loss_weights: got {len(weights)} for {len(names)} losses; wanted one for each"
        )
    _check_label_smoothing(names, classes, settings.get("label_smoothing", 0.0))
    _check_divergence(names, classes, settings.get("f_divergence_type", "reverse_kl"))
    losses = tuple(_built(cls, settings) for cls in classes)
    loss: Loss = losses[0]
    if len(losses) > 1 or weights is not None:
        loss = WeightedSum(losses, tuple(weights) if weights is not None else (1.0,) * len(losses))
    _check_weighting(names, loss, use_weighting, wpo_max_weight)
    return Wpo(loss, wpo_max_weight) if use_weighting else loss


def unknown_losses(names: Sequence[str]) -> list[str]:
    """Why each name is refused that no loss has."""
    return [f"loss_type: got {name!r}; {_meant_by(name)}" for name in names if name not in LOSSES]


def _classes(names: Sequence[str]) -> list[type[BaseLoss]]:
    for reason in unknown_losses(names):
        raise ValueError(reason)
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"loss_type: got {list(names)}; wanted one name, or a list of different ones"
        )
    classes = [LOSSES[name] for name in names]
    if len(names) > 1 and any(cls.unpaired for cls in classes):
        raise ValueError(
            f"loss_type: got {list(names)}; an unpaired loss stands alone: wanted one name"
        )
    return classes


def _meant_by(name: str) -> str:
    """What an unknown name may stand for, else the names that there are."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(part in LOSSES for part in parts):
        return f"a list is written [{', '.join(parts)}]"
    return f"wanted one of {', '.join(LOSSES)}{did_you_mean(name, LOSSES)}"


def _built(cls: type[BaseLoss], settings: dict[str, Any]) -> BaseLoss:
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: settings[name] for name in names if name in settings})


def _check_label_smoothing(
    names: Sequence[str], classes: list[type[BaseLoss]], value: float
) -> None:
    read = {field.name for cls in classes for field in dataclasses.fields(cls)}
    if value and "label_smoothing" not in read:
        raise ValueError(
            f"label_smoothing: got {value}, which {', '.join(names)} ignores (as in TRL 1.16); for "
            "conservative DPO use loss_type cdpo"
        )
    wanted = None
    if "robust" in names and not 0 <= value < 0.5:
        wanted = "from 0 to below 0.5"
    elif "exo_pair" in names and not 0 < value < 1:
        wanted = "above 0 and below 1"
    elif not 0 <= value <= 1:
        wanted = "from 0 to 1"
    if wanted is not None:
        raise ValueError(
            f"label_smoothing: got {value} with {', '.join(names)}; wanted a number {wanted}"
        )


def _check_weighting(
    names: Sequence[str], loss: Loss, use_weighting: bool, wpo_max_weight: float | None
) -> None:
    if not use_weighting:
        if wpo_max_weight is not None:
            raise ValueError(
                f"wpo_max_weight: got {wpo_max_weight} without use_weighting, which has the "
                "weights that it bounds; write use_weighting: true too"
            )
        return
    if loss.unpaired or loss.coupled or loss.averages_tokens:
        raise ValueError(
            f"use_weighting: got true with {', '.join(names)}; it weighs pairs one by one: wanted "
            "losses other than sft, aot and those of groups or unpaired rows"
        )


def _check_divergence(names: Sequence[str], classes: list[type[BaseLoss]], kind: str) -> None:
    if kind not in DIVERGENCES:
        raise ValueError(f"f_divergence_type: got {kind!r}; wanted one of {', '.join(DIVERGENCES)}")
    named = zip(names, classes, strict=True)
    fixed = [name for name, cls in named if not issubclass(cls, DivergenceLoss)]
    if kind != "reverse_kl" and any(name != "sft" for name in fixed):
        raise ValueError(
            f"f_divergence_type: got {kind} with {', '.join(fixed)}, which is defined for "
            "reverse_kl alone"
        )
