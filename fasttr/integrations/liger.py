"""Liger's chunked DPO and KTO losses by name, signature and results, on our ops:

    from fasttr.integrations.liger import LigerFusedLinearDPOLoss

in place of `from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss`. Written against
liger-kernel 0.8.5. Prompts and padding are left out of the products, log-probs and the sum of
gradients are fp32, and losses that Liger refuses (`ipo` and others of `fasttr.losses`) are there.

Legend: n sequences, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from fasttr_kernels import PreferenceLoss, from_padded, halves, linear_preference_loss
from torch import Tensor, nn

from fasttr.errors import FasttrError
from fasttr.losses import LOSSES, LossInputs, make_loss

DPO_LOSSES = tuple(
    name
    for name, cls in LOSSES.items()
    if cls.completions == 2 and not cls.coupled and not cls.unpaired and cls.needs_reference
)


class LigerFusedLinearDPOLoss(nn.Module):
    """Losses of pairs, (loss, aux) as Liger returns them.

    `compiled` and `chunk_size` are accepted and have no effect: chunks follow from memory, and
    nothing is compiled. `average_log_prob` gives the loss means over tokens in place of sums.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in DPO_LOSSES:
            raise FasttrError(
                f"loss_type: got {loss_type!r}; wanted one of {', '.join(DPO_LOSSES)}"
            )
        given = {"beta": beta, "label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
        read = {field.name for field in dataclasses.fields(LOSSES[loss_type])}
        settings: dict[str, Any] = {k: v for k, v in given.items() if k in read}
        self.loss = make_loss([loss_type], **settings)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha if compute_nll_loss else 0.0
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (n, S, D), all chosen, then all rejected
        target: Tensor,  # (n, S) what each position predicts, or ignore_index
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (n, S, D)
        ref_weight: Tensor | None = None,  # (V, D)
        ref_bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (chosen log-probs, rejected log-probs, mean chosen logits, mean rejected logits,
        nll of chosen tokens, chosen rewards, rejected rewards)): log-probs and rewards (n/2,), the
        others scalars, all but the loss without gradient. Mean logits are over all positions and
        the vocabulary, padding included, as in Liger."""
        order = halves(len(target))
        rows = _rows(_input, target, self.ignore_index, order)
        counts = rows.counts(_input.device)
        divisor_n = counts.clamp(min=1) if self.average_log_prob else torch.ones_like(counts)
        chosen_tokens = counts[::2].sum().clamp(min=1)
        ref_n = _reference(self, ref_input, ref_weight, ref_bias, target, order)

        def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
            of_groups = slice(2 * groups.start, 2 * groups.stop)
            by = divisor_n[of_groups]
            ref_logp = torch.zeros_like(logp) if ref_logp is None else ref_logp / by
            total = self.loss(LossInputs(logp / by, ref_logp, counts[of_groups].clamp(min=1))).sum()
            if not self.alpha:
                return total
            return total - self.alpha * len(counts) / 2 * logp[::2].sum() / chosen_tokens

        out = rows.head(lin_weight, bias, loss_fn, ref_n)
        logp_n = out.logp / divisor_n
        ratio_n = logp_n if ref_n is None else logp_n - ref_n / divisor_n
        nll = (
            -out.logp[::2].sum() / chosen_tokens
            if self.compute_nll_loss
            else out.loss.new_zeros(())
        )
        chosen, rejected = (
            _logit_sum(half, lin_weight, bias) / (half.shape[0] * half.shape[1] * len(lin_weight))
            for half in _input.chunk(2)
        )
        rewards_n = self.beta * ratio_n
        return out.loss, (
            logp_n[::2],
            logp_n[1::2],
            chosen,
            rejected,
            nll.detach(),
            rewards_n[::2],
            rewards_n[1::2],
        )


class LigerFusedLinearKTOLoss(nn.Module):
    """KTO with its KL term given, (loss, aux) as Liger returns them.

    `compiled` and `chunk_size` are accepted and have no effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        _input: Tensor,  # (n, S, D)
        lin_weight: Tensor,  # (V, D)
        target: Tensor,  # (n, S) what each position predicts, or ignore_index
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (n,) bool
        ref_input: Tensor | None = None,  # (n, S, D)
        ref_weight: Tensor | None = None,  # (V, D)
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | None = None,  # () or (n,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, sums over chosen and over rejected of log-probs, of logits, of rewards): scalars,
        all but the loss without gradient. Sums of logits are over all positions and the vocabulary,
        as in Liger."""
        if preference_labels is None:
            raise FasttrError("preference_labels: got none; wanted (n,) bool, true for chosen")
        order = torch.arange(len(target))
        rows = _rows(_input, target, self.ignore_index, order)
        counts = rows.counts(_input.device)
        divisor_n = counts.clamp(min=1) if self.average_log_prob else torch.ones_like(counts)
        ref_n = _reference(self, ref_input, ref_weight, ref_bias, target, order)
        is_chosen = preference_labels.bool()
        kl_n = (torch.zeros(()) if kl is None else kl).to(_input.device).expand(len(target))

        def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
            ratio = (logp if ref_logp is None else logp - ref_logp) / divisor_n[groups]
            h = self.beta * (ratio - kl_n[groups])
            return (1 - torch.where(is_chosen[groups], h, -h).sigmoid()).sum()

        out = rows.head(lin_weight, bias, loss_fn, ref_n, group=1)
        logp_n = out.logp / divisor_n
        ratio_n = logp_n if ref_n is None else logp_n - ref_n / divisor_n
        sides = (is_chosen, ~is_chosen)
        logps = [logp_n[side].sum() for side in sides]
        logits = [_logit_sum(_input[side], lin_weight, bias) for side in sides]
        rewards = [self.beta * ratio_n[side].sum() for side in sides]
        return out.loss, (*logps, *logits, *rewards)


class _Rows(NamedTuple):
    hidden: Tensor  # (T, D)
    target: Tensor  # (T,)
    lengths: list[int]  # (n,)

    def counts(self, device: torch.device) -> Tensor:
        return torch.tensor(self.lengths).to(device)

    def head(
        self,
        weight: Tensor,
        bias: Tensor | None,
        loss_fn: Any,
        ref_n: Tensor | None,
        group: int = 2,
    ) -> PreferenceLoss:
        return linear_preference_loss(
            self.hidden,
            weight,
            self.target,
            lengths=self.lengths,
            cu_groups=group,
            loss_fn=loss_fn,
            ref_logp=ref_n,
            bias=bias,
        )


def _rows(hidden: Tensor, target: Tensor, ignore_index: int, order: Tensor) -> _Rows:
    return _Rows(*from_padded(hidden, target, ignore_index, order))


@torch.no_grad()
def _reference(
    module: LigerFusedLinearDPOLoss | LigerFusedLinearKTOLoss,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    order: Tensor,
) -> Tensor | None:
    """(n,) summed log-probs under the reference, where there is one."""
    if not module.use_ref_model:
        return None
    if hidden is None or weight is None:
        raise FasttrError(
            "ref_input, ref_weight: got none with use_ref_model; wanted the reference's hidden "
            "states and head"
        )
    return _rows(hidden, target, module.ignore_index, order).head(weight, bias, None, None, 1).logp


@torch.no_grad()
def _logit_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """() of all positions' logits: by the sum of the weight's rows, without the logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.sum((0, 1), dtype=wide) @ weight.sum(0, dtype=wide)
    if bias is not None:
        total = total + hidden.shape[0] * hidden.shape[1] * bias.sum(dtype=wide)
    return total
