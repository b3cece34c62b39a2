"""Where log-probs are made: hidden states of a pack through transformers' own model, then the fused
head.

The loss is computed inside this module's forward, so that data-parallel hooks see it. Policy and
reference go through
the same op with the same packs: where they are equal, the log-ratio is exactly 0.

Legend: T packed tokens, R scored rows, N completions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fasttr_kernels import PreferenceLoss, linear_preference_loss
from torch import Tensor, nn

from fasttr.batch import PackedBatch
from fasttr.models.attention import gather_rows

LossFn = Callable[[Tensor, Tensor | None, slice], Tensor]


class HeadSpec(NamedTuple):
    """What lies between the last hidden state and the logits: softcap(logit_scale * (W h + b))."""

    logit_scale: float = 1.0
    softcap: float | None = None


class PackedModel(nn.Module):
    """A causal language model that scores packed trees.

    Args:
        model: a transformers causal LM whose attention is `fasttr_packed`.
        head: its head beyond weight and bias.
        attention_backend: `varlen`, `flash` or `segments`.
        bf16: compute under bfloat16 autocast; log-probs and the loss stay fp32.
        ld_alpha: weight of the log-probs beyond the length of a tree's shortest completion (LD-DPO,
            arXiv:2409.06411); None is 1. It enters every summed log-prob, of the policy and of the
            reference.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        head: HeadSpec,
        attention_backend: str,
        bf16: bool,
        ld_alpha: float | None = None,
    ):
        super().__init__()
        self.model = model
        self.head = head
        self.attention_backend = attention_backend
        self.bf16 = bf16
        self.ld_alpha = ld_alpha

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final hidden states of a pack, (T, D)."""
        return self.model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=False,
            fasttr_layout=batch.attention,
            fasttr_backend=self.attention_backend,
        ).last_hidden_state[0]

    def forward(
        self,
        batch: PackedBatch,
        loss_fn: LossFn | None = None,
        ref_logp: Tensor | None = None,  # (N,) fp32
        normalizer: float = 1.0,
        stats: bool = False,
    ) -> PreferenceLoss:
        """Score a pack that is on this module's device; with `loss_fn` also its share of the step's
        loss."""
        output = self.model.get_output_embeddings()
        cu_completions, cu_groups = batch.cu_completions, batch.cu_groups
        if self.ld_alpha is not None:
            # Head and tail of a completion are scored as two, and put together before anybody sees
            # them.
            cu_completions, cu_groups = batch.cu_heads, 2 * batch.cu_groups
            loss_fn = (
                None
                if loss_fn is None
                else self._from_heads(loss_fn, ref_logp, batch.cu_groups.tolist())
            )
            ref_logp = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden_RD = gather_rows(self.hidden_states(batch), batch.scored)
            out = linear_preference_loss(
                hidden_RD,
                output.weight,
                batch.target,
                cu_completions,
                cu_groups,
                loss_fn,
                ref_logp=ref_logp,
                normalizer=normalizer,
                bias=output.bias,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                stats=stats,
            )
        return out if self.ld_alpha is None else out._replace(logp=self._joined(out.logp))

    def _joined(self, logp_2N: Tensor) -> Tensor:
        assert self.ld_alpha is not None
        return logp_2N[0::2] + self.ld_alpha * logp_2N[1::2]

    def _from_heads(self, loss_fn: LossFn, ref_logp: Tensor | None, cu_groups: list[int]) -> LossFn:
        def joined(logp: Tensor, _: Tensor | None, groups: slice) -> Tensor:
            here = slice(cu_groups[groups.start], cu_groups[groups.stop])
            return loss_fn(self._joined(logp), None if ref_logp is None else ref_logp[here], groups)

        return joined

    @torch.no_grad()
    def score(self, batch: PackedBatch) -> Tensor:
        """Summed log-probs of the completions of a pack, (N,) fp32 nats, without gradients."""
        return self(batch.to(self.device)).logp
