"""Losses of token log-probs in three passes: policy gradients, whose weights are known as soon as a
completion is scored.

Legend: T scored rows, N completions, V vocabulary, D hidden size, C rows and n completions of a
chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import checks, chunks, products
from fasttr_kernels.head import Head, RowLogps, Statistics
from fasttr_kernels.objective import loss_and_gradient
from fasttr_kernels.preference import (
    PreferenceLoss,
    evaluate,
    linear_preference_loss_ref,
    outside_compile,
)

# (token_logp (t,), rows, completions) -> (): the summed loss of a slice of whole completions.
TokenLossFn = Callable[[Tensor, slice, slice], Tensor]


@outside_compile
def linear_policy_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    cu_completions: Tensor | None = None,  # (N+1,) host
    loss_fn: TokenLossFn | None = None,
    *,
    lengths: Sequence[int] | None = None,  # (N,) in place of cu_completions
    normalizer: float | None = None,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    stats: bool = False,
    cast_weight: Tensor | None = None,  # (V, D)
    weight_grad: Tensor | None = None,  # (V, D)
) -> PreferenceLoss:
    """A loss of token log-probs on top of a linear head, without its logits and without computing
    them twice.

    As `linear_preference_loss`, with a completion in place of a group and a token in place of a
    completion: loss = sum over completions of loss_fn(token_logp, rows, completions) / normalizer.
    Advantages, old and reference log-probs are data of loss_fn: PPO (arXiv:1707.06347), GRPO
    (2402.03300), DAPO (2503.14476), ... For a temperature t, give logit_scale / t.

    Args:
        loss_fn: (token_logp (t,), rows, completions) -> (), the sum of the losses of whole
            completions in order; the slices say which of the T rows and of the N completions they
            are. Plain differentiable torch without parameters, called once a chunk. None gives
            log-probs only.
        normalizer: a host number that divides the loss. None takes the completions of this call.

    All else, errors too, is as in `linear_preference_loss`; gradients through `stats` are not made.
    """
    compute = checks.head(hidden, weight, target, bias)
    checks.head_options(logit_scale, softcap)
    checks.target_range(target, weight.shape[0])
    checks.cast_weight(cast_weight, weight, compute)
    checks.weight_grad(weight_grad, weight, products.wide(compute))
    completions = checks.completions(cu_completions, lengths, hidden.shape[0])
    N = len(completions) - 1
    normalizer = max(1, N) if normalizer is None else normalizer
    checks.preference(None, (N,), hidden.device, normalizer, chunk_rows)
    checks.loss_fn(loss_fn, (), ())
    ready = weight if cast_weight is None else cast_weight
    batch = chunks.Batch(
        hidden=hidden.detach().to(compute),
        head=Head.of(ready, bias, logit_scale, softcap, compute),
        target=target.long(),
        cu_completions=completions,
        cu_groups=list(range(N + 1)),
        chunk_rows=chunk_rows or chunks.default_rows(weight.shape[0], hidden.device),
        statistics=Statistics(usual=stats),
    )
    objective = None if loss_fn is None else _TokenObjective(loss_fn, float(normalizer))
    return evaluate(hidden, weight, bias, batch, objective, weight_grad)


class _TokenObjective(NamedTuple):
    """A loss of token log-probs, as a chunk asks it."""

    loss_fn: TokenLossFn
    normalizer: float

    def weigh(
        self, want: bool, chunk: chunks.Chunk, logp_n: Tensor, rows_C: RowLogps
    ) -> chunks.Weights:
        loss, weight_C = loss_and_gradient(
            self.loss_fn, rows_C.logp, [chunk.rows, chunk.completions], self.normalizer, want
        )
        return chunks.Weights(loss, row=weight_C)


def linear_policy_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_completions: Tensor | None = None,
    loss_fn: TokenLossFn | None = None,
    *,
    lengths: Sequence[int] | None = None,
    normalizer: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: bool = False,
) -> PreferenceLoss:
    """The specification, in plain torch with the whole logits, in the dtype of the arguments."""
    completions = checks.completions(cu_completions, lengths, hidden.shape[0])
    N = len(completions) - 1
    out = linear_preference_loss_ref(
        hidden,
        weight,
        target,
        torch.tensor(completions),
        1,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=stats,
    )
    if loss_fn is None:
        return out
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    token_logp = z.log_softmax(-1).gather(1, target.long()[:, None])[:, 0]
    total = loss_fn(token_logp, slice(0, hidden.shape[0]), slice(0, N))
    return out._replace(loss=total / (max(1, N) if normalizer is None else normalizer))
