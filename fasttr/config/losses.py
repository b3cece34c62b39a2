"""Settings of the loss, and of the reference that it compares with."""

from __future__ import annotations

from dataclasses import dataclass

from fasttr.losses import DIVERGENCES
from fasttr.settings import (
    above,
    at_least,
    between,
    one_of,
    setting,
    whole,
)


@dataclass(frozen=True)
class LossSettings:
    """Loss."""

    loss_type: str | list[str] | None = setting(
        None,
        None,
        "name of a loss, or a list of names whose losses are summed; none means sigmoid for pairs "
        "and kto for unpaired rows",
        in_eval=True,
    )
    loss_weights: list[float] | None = setting(
        None, None, "weight of each loss of a list; none means 1", in_eval=True
    )
    beta: float = setting(
        0.1,
        above(0),
        "strength of the pull towards the reference; tau of ipo",
        in_eval=True,
    )
    label_smoothing: float = setting(
        0.0,
        between(0, 1),
        "share of wrong labels that cdpo, robust, exo_pair, aot and aot_unpaired expect",
        in_eval=True,
    )
    f_divergence_type: str = setting(
        "reverse_kl", one_of(*DIVERGENCES), "divergence that the loss is made of", in_eval=True
    )
    f_alpha_divergence_coef: float = setting(0.5, None, "alpha of alpha_divergence", in_eval=True)
    ld_alpha: float | None = setting(
        None,
        between(0, 1),
        "weight of the log-probs beyond the length of a pair's shorter side; none means 1",
        in_eval=True,
    )
    discopop_tau: float = setting(0.05, above(0), "temperature of discopop", in_eval=True)
    simpo_gamma: float = setting(0.5, None, "target margin of simpo", in_eval=True)
    desirable_weight: float = setting(
        1.0, at_least(0), "factor on the losses of desirable rows", in_eval=True
    )
    undesirable_weight: float = setting(
        1.0, at_least(0), "factor on the losses of undesirable rows", in_eval=True
    )
    use_weighting: bool = setting(
        False,
        None,
        "weigh each pair by how likely the policy is to write its sides (WPO, arXiv:2406.11827)",
        in_eval=True,
    )
    wpo_max_weight: float | None = setting(
        None, above(0), "most that WPO weighs a pair; 1 in the paper's code", in_eval=True
    )
    group_size: int | None = setting(
        None,
        whole(1),
        "rows whose losses are computed together where a loss couples rows; none means "
        "train_batch_size",
        in_eval=True,
    )
    eval_group_size: int | None = setting(
        None,
        whole(1),
        "rows of an evaluation whose losses are computed together; none means group_size",
    )
    mismatch_size: int | None = setting(
        None,
        whole(1),
        "rows among which the mismatched completions of kto go round; none means group_size",
        in_eval=True,
    )


@dataclass(frozen=True)
class ReferenceSettings:
    """Reference."""

    ref_update: str = setting(
        "none",
        one_of("none", "soft", "hard"),
        "how the reference moves: not at all, reference <- alpha policy + (1 - alpha) reference, "
        "or reference <- policy",
    )
    ref_update_alpha: float = setting(0.6, between(0, 1), "share of the policy in a soft update")
    ref_update_every: int = setting(512, whole(1), "optimizer steps between updates")
    ref_on_host: bool | None = setting(
        None,
        None,
        "a soft reference rests in pinned memory of the host between windows; none means where "
        "the memory plan of a GPU has no room for it. Where it rests may change its last bit",
        may_change=True,
    )
    ref_model_name_or_path: str | None = setting(
        None, None, "another model as the first reference; none means the policy at its start"
    )
