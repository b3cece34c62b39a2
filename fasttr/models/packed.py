"""Where log-probs are made: hidden states of a pack through transformers' own model, then the
fused head.

The loss is computed inside this module's forward, so that data-parallel hooks see it. Policy and
reference go through the same op with the same packs: where they are equal, the log-ratio is exactly
0.

Legend: T packed tokens, R predicting rows, N completions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fasttr_kernels import PreferenceLoss, linear_preference_loss
from torch import Tensor, nn

from fasttr.batch import PackedBatch
from fasttr.errors import FasttrError
from fasttr.losses import LossFn
from fasttr.models.gather import gather_rows
from fasttr.models.lora import Adapter
from fasttr.models.tiers import rows_of
from fasttr.packing.tiers import SHARED

# Keys of configs that scale the logits: by the number, or by one over it.
_SCALES = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)


class HeadSpec(NamedTuple):
    """What lies between the last hidden state and the logits: softcap(logit_scale * (W h + b))."""

    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadSpec:
        """The head that a transformers config describes; `checks.check_head` holds it to that."""
        scale = 1.0
        for key in _SCALES:
            scale *= getattr(config, key, None) or 1.0
        for key in _DIVISORS:
            scale /= getattr(config, key, None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None))


class HeadWeight(NamedTuple):
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)


def decoder_of(model: Any) -> Any:
    """The part of a causal LM that makes its last hidden states."""
    for decoder in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if decoder is not None and decoder is not model:
            return decoder
    raise FasttrError(
        f"{type(model).__name__}: no part of it makes hidden states apart from its head"
    )


class PackedModel(nn.Module):
    """A causal language model that gives log-probs of packed trees.

    Args:
        model: a transformers causal LM; in the tier `shared` its attention is `fasttr_packed`.
        head: its head beyond weight and bias.
        attention_backend: `varlen`, `flash` or `segments`, of the tier `shared`.
        bf16: compute under bfloat16 autocast; log-probs and the loss stay fp32.
        ld_alpha: weight of the log-probs beyond the length of a tree's shortest completion (LD-DPO,
            arXiv:2409.06411); None is 1. It enters every summed log-prob, of the policy and of the
            reference.
        tier: how tokens reach the model, one of `fasttr.packing.tiers.TIERS`. Packs for others than
            `shared` repeat the prompt for every completion.
        adapter: what is trained in place of the model's own weights, which are frozen.
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        head: HeadSpec | None = None,
        attention_backend: str = "segments",
        bf16: bool = False,
        ld_alpha: float | None = None,
        tier: str = SHARED,
        adapter: Adapter | None = None,
    ):
        super().__init__()
        self.model = model
        self.head = head or HeadSpec()
        self.tier = tier
        self.rows = rows_of(tier, attention_backend)
        self.bf16 = bf16
        self.ld_alpha = ld_alpha
        self.adapter = adapter

    @property
    def trained_model(self) -> Any:
        """What a person is given at the end: the transformers model, or peft's with its adapter."""
        return self.model if self.adapter is None else self.adapter.peft_model

    def merge_adapter(self) -> None:
        """Add the adapter to the weights for good; nothing is left to train."""
        if self.adapter is not None:
            self.model = self.adapter.merge()
            self.adapter = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def head_weight(self) -> HeadWeight:
        """The one place where the output weight is read."""
        output = self.model.get_output_embeddings()
        return HeadWeight(output.weight, output.bias)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Final hidden states of a pack, (T, D)."""
        output = decoder_of(self.model)(**self.rows.inputs(batch))
        return self.rows.flat(output.last_hidden_state, batch)

    def forward(
        self,
        batch: PackedBatch,
        loss_fn: LossFn | None = None,
        ref_logp: Tensor | None = None,  # (N,) fp32
        normalizer: float = 1.0,
        stats: bool = False,
    ) -> PreferenceLoss:
        """Log-probs of a pack on this module's device; with `loss_fn` its share of the loss too."""
        cu_completions, cu_groups = batch.cu_completions, batch.cu_groups
        if self.ld_alpha is not None:
            # Both parts of a completion are summed apart, and joined before anybody sees them.
            cu_completions, cu_groups = batch.cu_ld_parts, 2 * batch.cu_groups
            if loss_fn is not None:
                loss_fn = self._of_joined_parts(loss_fn, ref_logp, batch.cu_groups.tolist())
            ref_logp = None
        head = self.head_weight()
        with self.autocast():
            hidden_RD = gather_rows(self.hidden_states(batch), batch.predicting)
            out = linear_preference_loss(
                hidden_RD,
                head.weight,
                batch.target,
                cu_completions,
                cu_groups,
                loss_fn,
                ref_logp=ref_logp,
                normalizer=normalizer,
                bias=head.bias,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                stats=stats,
            )
        if self.ld_alpha is None:
            return out
        return out._replace(logp=self._joined(out.logp, self.ld_alpha))

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> Tensor:
        """Summed log-probs of the completions of a pack, (N,) fp32 nats, without gradients."""
        return self(batch.to(self.device)).logp

    def _of_joined_parts(
        self, loss_fn: LossFn, ref_logp: Tensor | None, cu_groups: list[int]
    ) -> LossFn:
        """`loss_fn` as a function of the log-probs of parts; `ref_logp` is of whole completions."""

        assert self.ld_alpha is not None
        alpha = self.ld_alpha

        def of_parts(logp_2N: Tensor, _: Tensor | None, groups: slice) -> Tensor:
            completions = slice(cu_groups[groups.start], cu_groups[groups.stop])
            ref = None if ref_logp is None else ref_logp[completions]
            joined = self._joined(logp_2N, alpha)
            return loss_fn(joined, ref, groups, whole_logp=self._joined(logp_2N, 1.0))

        return of_parts

    @staticmethod
    def _joined(logp_2N: Tensor, share_of_rest: float) -> Tensor:
        return logp_2N[0::2] + share_of_rest * logp_2N[1::2]
