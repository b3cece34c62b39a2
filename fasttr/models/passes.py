"""The passes of a pack that add its gradients to those that are there.

Legend: T packed tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from fasttr_kernels import PreferenceLoss
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import LossFn
from fasttr.models.packed import PackedModel


def forward_and_backward(
    packed: PackedModel,
    batch: PackedBatch,
    loss_fn: LossFn,
    ref_logp: Tensor | None = None,
    **arguments: Any,
) -> PreferenceLoss:
    """What `packed` makes of a pack on its device, once it is differentiated.

    A pack in parts has the activations of one at a time: all parts go through the layers without
    gradients, the loss is made of all log-probs, and then each part goes through once more, for
    the gradient that its hidden states got. Exact for any loss, at the price of that forward.
    """
    if not batch.parts:
        out = packed(batch, loss_fn, ref_logp, **arguments)
        _backward(packed, out.loss)
        return out
    hidden_TD = _hidden_states(packed, batch).requires_grad_()
    of_pack = hidden_TD[: len(batch.input_ids)]
    out = packed(batch, loss_fn, ref_logp, hidden_TD=of_pack, **arguments)
    _backward(packed, out.loss)
    assert hidden_TD.grad is not None
    sizes = [len(part.input_ids) for part in batch.parts]
    for part, grad in zip(batch.parts, hidden_TD.grad.split(sizes), strict=True):
        with packed.autocast():
            of_part = packed.hidden_states(part)
        _backward(packed, of_part, grad)
    return out


def _hidden_states(packed: PackedModel, batch: PackedBatch) -> Tensor:
    """(T or more, D) of the parts, as scoring makes them: log-ratios begin at 0."""
    found = []
    with torch.set_grad_enabled(packed.scores_as_it_trains), packed.autocast():
        for part in batch.parts:
            found.append(packed.hidden_states(part).detach())
    return torch.cat(found)


def _backward(packed: PackedModel, x: Tensor, grad: Tensor | None = None) -> None:
    if x.requires_grad:  # of the layers nothing may be trained, of the head always its rows
        x.backward(grad)
    if packed.shards is not None:
        packed.shards.collect_gradients()
