"""The auxiliary loss that keeps the experts of a mixture equally busy.

Legend: T packed tokens, N completions, L tokens of the longest.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.errors import FasttrError
from fasttr.models.tiers import Rows


def coefficient_of(config: Any, asked: float | None) -> float:
    """What the auxiliary loss is multiplied with: as asked, else the architecture's own, as TRL has
    it; 0 for models without experts. FasttrError where there is nothing to multiply."""
    text = config.get_text_config()
    has_experts = hasattr(text, "output_router_logits")
    if asked and not has_experts:
        raise FasttrError(
            f"router_aux_loss_coef: got {asked} with architecture {text.model_type!r}, which has "
            "no experts whose router it could read; leave it out"
        )
    own = getattr(text, "router_aux_loss_coef", 0.0) if has_experts else 0.0
    return float(own if asked is None else asked)


class RouterLoss:
    """transformers' load_balancing_loss_func of a model's own module, arXiv:2101.03961 (4) to (6).

    Each token counts as often as it would with a prompt for every completion. Those of mismatched
    completions do not where `leaves_out_mismatched` is set: nothing is learned from them.
    """

    leaves_out_mismatched = False

    def __init__(self, model: Any, coefficient: float):
        self.coefficient = coefficient
        module = sys.modules[type(model).__module__]
        self._function: Any = getattr(module, "load_balancing_loss_func", None)
        if self._function is None:
            raise FasttrError(
                f"router_aux_loss_coef: got {coefficient} and transformers has no auxiliary loss "
                f"for {model.config.model_type}; set it to 0"
            )
        self._experts = model.num_experts
        self._chosen = model.num_experts_per_tok

    def __call__(self, router_logits: tuple[Tensor, ...], rows: Rows, batch: PackedBatch) -> Tensor:
        """() fp32, before the coefficient."""
        count = rows.without_mismatched if self.leaves_out_mismatched else rows.token_weights
        weights = count(batch)
        return self._function(router_logits, self._experts, self._chosen, weights)
