"""Token log-probs of packed rollouts, and losses of them, through the fused head.

Legend: R predicting rows, one for each token of a completion that has a prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from fasttr_kernels import PreferenceLoss, linear_policy_loss
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.models.gather import gather_rows
from fasttr.models.packed import PackedModel

# (token_logp (t,), rows, completions) -> (): the summed loss of whole completions.
TokenLossFn = Callable[[Tensor, slice, slice], Tensor]


def policy_loss(
    model: PackedModel,
    batch: PackedBatch,
    loss_fn: TokenLossFn | None = None,
    *,
    temperature: float = 1.0,
    normalizer: float = 1.0,
    stats: bool = False,
) -> PreferenceLoss:
    """Log-probs of a pack on the model's device, and with `loss_fn` its share of the loss."""
    head = model.head_weight()
    with model.autocast():
        hidden_RD = gather_rows(model.hidden_states(batch), batch.predicting)
        return linear_policy_loss(
            hidden_RD,
            head.weight,
            batch.target,
            batch.cu_completions,
            loss_fn,
            normalizer=normalizer,
            bias=head.bias,
            logit_scale=model.head.logit_scale / temperature,
            softcap=None if model.head.softcap is None else model.head.softcap / temperature,
            stats=stats,
        )


@torch.no_grad()
def token_logps(model: PackedModel, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """(R,) fp32 log-probs of the tokens of a pack, without gradients, on the model's device."""
    return policy_loss(model, batch.to(model.device), temperature=temperature).token_logp
