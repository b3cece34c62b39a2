"""Preference losses: a dozen lines each, on vectors of summed log-probs, with torch alone.

    from fasttr.losses import Scored, Sigmoid
    # (B,); completions: chosen, rejected, chosen, ...
    loss = Sigmoid(beta=0.1)(Scored(logp, ref_logp, tokens))

`make_loss` builds one from the names and settings of a configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fasttr.losses.base import Loss, Scored, Weighted, group_loss
from fasttr.losses.coupled import Aot, AotUnpaired, ApoZeroUnpaired, Kto, KtoPaired, kl_estimate
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

LOSSES: dict[str, type[Loss]] = {
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

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "Loss",
    "Scored",
    "Weighted",
    "group_loss",
    "kl_estimate",
    "make_loss",
    *(cls.__name__ for cls in LOSSES.values()),
]


def make_loss(
    names: Sequence[str], weights: Sequence[float] | None = None, **settings: Any
) -> Loss | Weighted:
    """The loss of `loss_type` names and the settings of a configuration that it reads.

    Raises ValueError (got, wanted) on an unknown name, on weights that do not match, on unpaired
    losses in a list, and on a setting that none of the named losses reads although it differs from
    its default.
    """
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"loss_type: got {name!r}; wanted one of {', '.join(LOSSES)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"loss_type: got {list(names)}; wanted one name, or a list of different ones"
        )
    classes = [LOSSES[name] for name in names]
    if len(names) > 1 and any(cls.unpaired for cls in classes):
        raise ValueError(
            f"loss_type: got {list(names)}; an unpaired loss stands alone: wanted one name"
        )
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"loss_weights: got {len(weights)} for {len(names)} losses; wanted one for each"
        )
    _check_settings(names, classes, settings)
    built = tuple(
        cls(**{f.name: settings[f.name] for f in dataclasses.fields(cls) if f.name in settings})
        for cls in classes
    )
    if len(built) == 1 and weights is None:
        return built[0]
    return Weighted(built, tuple(weights) if weights is not None else (1.0,) * len(built))


def _check_settings(
    names: Sequence[str], classes: list[type[Loss]], settings: dict[str, Any]
) -> None:
    read = {f.name for cls in classes for f in dataclasses.fields(cls)}
    e = settings.get("label_smoothing", 0.0)
    if e and "label_smoothing" not in read:
        raise ValueError(
            f"label_smoothing: got {e}, which {', '.join(names)} ignores (as in TRL 1.16); for "
            "conservative DPO use "
            "loss_type cdpo"
        )
    if (
        not 0 <= e <= 1
        or ("robust" in names and e >= 0.5)
        or ("exo_pair" in names and not 0 < e < 1)
    ):
        wanted = {"robust": "from 0 to below 0.5", "exo_pair": "above 0 and below 1"}
        text = next((wanted[name] for name in names if name in wanted), "from 0 to 1")
        raise ValueError(
            f"label_smoothing: got {e} with {', '.join(names)}; wanted a number {text}"
        )
    kind = settings.get("f_divergence_type", "reverse_kl")
    if kind not in DIVERGENCES:
        raise ValueError(f"f_divergence_type: got {kind!r}; wanted one of {', '.join(DIVERGENCES)}")
    fixed = [
        name
        for name, cls in zip(names, classes, strict=True)
        if not issubclass(cls, DivergenceLoss)
    ]
    if kind != "reverse_kl" and any(name != "sft" for name in fixed):
        raise ValueError(
            f"f_divergence_type: got {kind} with {', '.join(fixed)}, which is defined for "
            "reverse_kl alone"
        )
