"""Preference losses of hidden states: a module for a loop of one's own.

Legend: B rows, m completions of a row, n = m B completions, S positions, T scored rows, D hidden
size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fasttr_kernels import PreferenceLoss, from_padded, halves, linear_preference_loss
from torch import Tensor, nn

from fasttr.errors import FasttrError, did_you_mean
from fasttr.losses import LOSSES, Loss, LossInputs, as_loss, group_loss, make_loss

ORDERS = ("halves", "rows")


class LinearLossOutput(NamedTuple):
    """Per completion in the order of the batch, fp32 (fp64 for fp64 inputs); all but `loss` without
    gradient."""

    loss: Tensor  # () mean over the rows, or their sum over `normalizer`
    logp: Tensor  # (n,) summed over tokens, nats
    rewards: Tensor  # (n,) beta times the log-ratio; without a reference times a token's mean logp
    token_counts: Tensor  # (n,) int64


class Scored(NamedTuple):
    """Rows of hidden states in the order of the losses: the completions of a row in turn."""

    hidden: Tensor  # (T, D)
    target: Tensor  # (T,)
    lengths: list[int]  # (n,)
    order: Tensor  # (n,) the completion of the batch that stands here


class LinearPreferenceLoss(nn.Module):
    """A loss of `fasttr.losses`, or one's own, on top of a linear head, without its logits.

    Args:
        loss: a name (`sigmoid` is DPO, `ipo`, `kto`, ...; `fasttr.losses.LOSSES` has all), a list
            of names, or a function from `fasttr.losses.LossInputs` to (B,).
        order: `halves`, where a batch holds first all chosen, then all rejected completions (TRL,
            Liger, torchtune); `rows`, where those of a row follow each other. Rows of `kto` have
            two completions: their own, and a mismatched one for its KL term.
        ignore_index: label of a position that is not scored.
        labels_are_shifted: a label is what its position predicts. Else it is the token that stands
            there, as in transformers.
        logit_scale, softcap, chunk_rows: of `fasttr_kernels.linear_preference_loss`.
        settings: of the loss by name: beta, label_smoothing, simpo_gamma, ...

    Raises:
        FasttrError, ValueError: a name or a setting that the loss does not have, with those that it
            has.
    """

    def __init__(
        self,
        loss: str | Sequence[str] | Callable[[LossInputs], Tensor] = "sigmoid",
        *,
        order: str = "halves",
        ignore_index: int = -100,
        labels_are_shifted: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        chunk_rows: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            near = did_you_mean(order, ORDERS)
            raise FasttrError(f"order: got {order!r}; wanted one of {', '.join(ORDERS)}{near}")
        self.loss = _loss(loss, settings)
        self.order = order
        self.ignore_index = ignore_index
        self.labels_are_shifted = labels_are_shifted
        self.options = {"logit_scale": logit_scale, "softcap": softcap, "chunk_rows": chunk_rows}

    def forward(
        self,
        hidden: Tensor,  # (n, S, D), or (T, D) with lengths
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (n, S), or (T,) with lengths
        ref_logp: Tensor | None = None,  # (n,)
        *,
        bias: Tensor | None = None,  # (V,)
        lengths: Sequence[int] | None = None,  # (n,)
        desirable: Tensor | None = None,  # (B,) bool
        row_weights: Tensor | None = None,  # (B,)
        normalizer: float | None = None,
    ) -> LinearLossOutput:
        """The loss, differentiable in hidden, weight and bias.

        Args:
            hidden, weight: bf16, fp32 or fp64, of one dtype, or under `torch.autocast`.
            labels: int64; of (T, D) rows what each predicts, all of them scored.
            ref_logp: log-probs under the reference, as `logps` gives them; needed unless the loss
                has no reference.
            lengths: rows of each completion, in place of padding.
            desirable: the verdict on each row of an unpaired loss.
            row_weights: factors of the rows' losses.
            normalizer: what the sum over rows is divided by: with gradient accumulation the rows of
                a step. None takes those of this call.
        """
        if self.loss.needs_reference and ref_logp is None:
            raise FasttrError(
                "ref_logp: got none; wanted the reference's log-probs, since this loss compares "
                "with it: logps() of its hidden states"
            )
        scored = self._scored(hidden, labels, lengths)
        counts = torch.tensor(scored.lengths).to(hidden.device)
        B = len(counts) // self.loss.completions
        loss_fn = self._loss_fn(counts, row_weights, desirable, hidden)
        ref_n = None if ref_logp is None else ref_logp[scored.order]
        out = self._head(
            scored,
            weight,
            bias,
            loss_fn=loss_fn,
            cu_groups=torch.tensor([0, len(counts)]) if self.loss.coupled else len(counts) // B,
            ref_logp=ref_n,
            normalizer=B if normalizer is None else normalizer,
            loss_reads=self.loss.head_means,
        )
        ratio = out.logp / counts.clamp(min=1) if ref_n is None else out.logp - ref_n
        as_given = torch.argsort(scored.order)
        return LinearLossOutput(
            loss=out.loss,
            logp=out.logp[as_given],
            rewards=self.loss.beta * ratio[as_given],
            token_counts=counts[as_given],
        )

    @torch.no_grad()
    def logps(
        self,
        hidden: Tensor,  # as in forward
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """(n,) summed log-probs in nats, in the order of the batch: a reference's `ref_logp`.

        Where the reference equals the policy, and chunks and batch are the same, log-ratios are 0
        bit for bit.
        """
        scored = self._scored(hidden, labels, lengths)
        groups = torch.tensor([0, len(scored.lengths)])
        coupled = groups if self.loss.coupled else self.loss.completions
        return self._head(scored, weight, bias, cu_groups=coupled).logp[torch.argsort(scored.order)]

    def _head(
        self, scored: Scored, weight: Tensor, bias: Tensor | None, **call: Any
    ) -> PreferenceLoss:
        return linear_preference_loss(
            scored.hidden,
            weight,
            scored.target,
            lengths=scored.lengths,
            bias=bias,
            **self.options,  # type: ignore[arg-type]
            **call,
        )

    def _scored(self, hidden: Tensor, labels: Tensor, lengths: Sequence[int] | None) -> Scored:
        m = self.loss.completions
        n = len(labels) if lengths is None else len(lengths)
        if n == 0 or n % m:
            raise FasttrError(
                f"labels: got {n} completions; wanted a multiple of {m}, which is what a row of "
                "this loss has"
            )
        order = halves(n, m) if self.order == "halves" else torch.arange(n)
        if lengths is None:
            if not self.labels_are_shifted:
                labels = F.pad(labels[:, 1:], (0, 1), value=self.ignore_index)
            rows = from_padded(hidden, labels, self.ignore_index, order)
            return Scored(rows.hidden, rows.target, rows.lengths, order.to(hidden.device))
        place = _places(lengths, order.tolist()).to(hidden.device)
        ordered = [lengths[number] for number in order.tolist()]
        return Scored(hidden[place], labels[place], ordered, order.to(hidden.device))

    def _loss_fn(
        self,
        counts: Tensor,
        row_weights: Tensor | None,
        desirable: Tensor | None,
        hidden: Tensor,
    ) -> Callable[..., Tensor]:
        m = self.loss.completions
        B = len(counts) // m
        if self.loss.unpaired and (desirable is None or desirable.shape != (B,)):
            got = "none" if desirable is None else f"shape {tuple(desirable.shape)}"
            raise FasttrError(f"desirable: got {got}; wanted ({B},) bool, a verdict on each row")
        if row_weights is None:
            row_weights = torch.ones(B, device=hidden.device)
        counts = counts.clamp(min=1)  # a completion that was cut away has log-prob 0
        return group_loss(
            self.loss,
            counts,
            row_weights,
            cu_rows=[0, B] if self.loss.coupled else None,
            labels=desirable,
            chosen_tokens_mean=counts[::m].float().mean().expand(B),
        )


def _places(lengths: Sequence[int], order: Sequence[int]) -> Tensor:
    """(T,) the rows of completions in another order."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in order])


def _loss(loss: Any, settings: dict[str, Any]) -> Loss:
    """The loss that is meant, with its settings checked by name."""
    if not isinstance(loss, str) and callable(loss):
        if set(settings) - {"beta"}:
            raise FasttrError(
                f"{sorted(set(settings) - {'beta'})[0]}: got it beside a loss of your own; wanted "
                "it inside that loss"
            )
        return as_loss(loss, **settings)
    names = [loss] if isinstance(loss, str) else list(loss)
    classes = [LOSSES[name] for name in names if name in LOSSES]
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    weights = settings.pop("loss_weights", None)
    for name in settings:
        if classes and name not in known:
            raise FasttrError(
                f"{name}: {', '.join(names)} has no such setting; wanted one of "
                f"{', '.join(sorted(known))}{did_you_mean(name, known)}"
            )
    return make_loss(names, weights, **settings)
