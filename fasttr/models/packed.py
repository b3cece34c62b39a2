"""Where log-probs are made: hidden states of a pack through transformers' own model, then the
fused head.

The loss is computed inside this module's forward, so that data-parallel hooks see it. Policy and
reference go through the same op with the same packs: where they are equal, the log-ratio is exactly
0.

Legend: T packed tokens, R predicting rows, N completions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from fasttr_kernels import PreferenceLoss
from fasttr_kernels.chunks import default_rows, rows_of_memory
from torch import Tensor, nn

from fasttr.batch import PackedBatch, Part
from fasttr.errors import FasttrError
from fasttr.losses import LossFn
from fasttr.models.gather import gather_rows
from fasttr.models.lora import Adapter
from fasttr.models.router import RouterLoss
from fasttr.models.sharded import Opaque, Shards, score_through
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


def head_rows(vocabulary: int, memory: float | None) -> int:
    """Rows whose logits the head has at once, on a GPU of that many bytes or (None) on a CPU."""
    if memory is None:
        return default_rows(vocabulary, torch.device("cpu"))
    return rows_of_memory(vocabulary, int(memory))


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
        router: the auxiliary loss of a mixture of experts.

    Attributes:
        scores_as_it_trains: score through the graph of the training forward. Compiled without
            gradients a layer may round otherwise, and log-ratios would not begin at 0.
        offloads: what the layers leave for the backward is in host memory until then.
        router_loss: () what the router's loss was in the last forward with `router_share`, detached
            and before its coefficient.
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
        router: RouterLoss | None = None,
        adapter: Adapter | None = None,
    ):
        super().__init__()
        self.model = model
        self.head = head or HeadSpec()
        self.tier = tier
        self.rows = rows_of(tier, attention_backend)
        self.router = router
        self.router_loss: Tensor | None = None
        self.scores_as_it_trains = False
        self.offloads = False
        self.bf16 = bf16
        self.ld_alpha = ld_alpha
        self._cast_head: Tensor | None = None
        self.adapter = adapter
        self.shards: Shards | None = None  # what lies here of a model that is divided among ranks

    def __call__(self, batch: PackedBatch, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(self._wrapped(batch), *args, **kwargs)

    def _wrapped(self, tokens: PackedBatch | Part) -> Any:
        return tokens if self.shards is None else Opaque(tokens)

    def local_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name: of a divided model this process's rows, in plain tensors."""
        if self.shards is None:
            return dict(self.named_parameters())
        return self.shards.parameters

    def reshard(self) -> None:
        """Before the rows of a divided model change: what is gathered of them is let go of."""
        if self.shards is not None:
            self.shards.reshard()

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

    def autocast(self, keeps_copies: bool = False) -> torch.autocast:
        """Without autocast's cache unless it is asked for: it would keep a copy of every fp32
        weight through a forward and, where activations are recomputed, through the backward."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=keeps_copies
        )

    @contextlib.contextmanager
    def weights_still(self) -> Iterator[None]:
        """Within, no weight changes: an fp32 head is cast to bf16 once, not in every call."""
        weight = self.head_weight().weight.detach()
        if self.bf16 and weight.dtype != torch.bfloat16 and self.shards is None:
            self._cast_head = weight.to(torch.bfloat16)
        try:
            yield
        finally:
            self._cast_head = None
            self.reshard()

    def head_weight(self) -> HeadWeight:
        """The output weight, whole where the model is; see `score_through`."""
        output = self.model.get_output_embeddings()
        return HeadWeight(output.weight, output.bias)

    def hidden_states(self, tokens: PackedBatch | Part) -> Tensor:
        """Final hidden states of a pack or of a part of one, (T, D), through the layers at once."""
        return self.rows.flat(self.through_layers(self._wrapped(tokens)), tokens)

    def through_layers(self, tokens: PackedBatch | Part | Opaque) -> Tensor:
        """The same in the rows of the tier. Ranks that hold a model together meet in this call."""
        tokens = tokens.content if isinstance(tokens, Opaque) else tokens
        found: Tensor = self._decoded(tokens).last_hidden_state
        return found

    def _part_by_part(self, batch: PackedBatch) -> Tensor:
        """(T, D), of the parts of a pack one after the other."""
        parts = batch.parts or (batch,)
        found = [self.rows.flat(self._decoded(part).last_hidden_state, part) for part in parts]
        return torch.cat(found)[: len(batch.input_ids)] if batch.parts else found[0]

    def _decoded(self, tokens: PackedBatch | Part, **asked: bool) -> Any:
        """The output of the decoder."""
        with self._where_inputs_are_kept():
            return decoder_of(self.model)(**self.rows.inputs(tokens), **asked)

    def _where_inputs_are_kept(self) -> contextlib.AbstractContextManager[Any]:
        if not self.offloads:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    @torch.no_grad()
    def own_logits(self, batch: PackedBatch | Opaque) -> Tensor:
        """(T, V) what the model's own forward makes of a pack, for a check of the head."""
        batch = batch.content if isinstance(batch, Opaque) else batch
        with self.autocast():
            output = self.model(**self.rows.inputs(batch))
        return self.rows.flat(output.logits, batch)

    def forward(
        self,
        batch: PackedBatch | Opaque,
        loss_fn: LossFn | None = None,
        ref_logp: Tensor | None = None,  # (N,) fp32
        normalizer: float = 1.0,
        stats: bool = False,
        router_share: float = 0.0,
        head_grad: Tensor | None = None,  # (V, D) fp32
        head_means: Sequence[str] = (),
        hidden_TD: Tensor | None = None,
    ) -> PreferenceLoss:
        """Log-probs of a pack on this module's device; with `loss_fn` its share of the loss too.

        `router_share` of the router's loss is added to it, where the model has one. The head's
        gradient is added to `head_grad` where that is given, and the loss must then be
        differentiated once, as it is. `head_means`: statistics whose means over completions
        `loss_fn` gets as fourth argument. `hidden_TD`: what the layers made of the pack, which are
        then not called.
        """
        batch = batch.content if isinstance(batch, Opaque) else batch
        cu_completions, cu_groups = batch.cu_completions, batch.cu_groups
        if self.ld_alpha is not None:
            # Both parts of a completion are summed apart, and joined before anybody sees them.
            cu_completions, cu_groups = batch.cu_ld_parts, 2 * batch.cu_groups
            if loss_fn is not None:
                loss_fn = self._of_joined_parts(loss_fn, ref_logp, batch)
            ref_logp = None
        with self.autocast():
            reads_router = self.router is not None and router_share > 0
            router_logits: Any = None
            if reads_router:
                output = self._decoded(batch, output_router_logits=True)
                hidden_TD = self.rows.flat(output.last_hidden_state, batch)
                router_logits = output.router_logits
            elif hidden_TD is None:
                hidden_TD = self._part_by_part(batch)
            hidden_RD = gather_rows(hidden_TD, batch.predicting)
            out = score_through(
                self.model.get_output_embeddings(),
                hidden_RD,
                target=batch.target,
                cu_completions=cu_completions,
                cu_groups=cu_groups,
                loss_fn=loss_fn,
                ref_logp=ref_logp,
                normalizer=normalizer,
                logit_scale=self.head.logit_scale,
                softcap=self.head.softcap,
                stats=stats,
                cast_weight=self._cast_head,
                weight_grad=head_grad,
                loss_reads=head_means,
            )
        if self.router is not None and reads_router:
            balance = self.router(router_logits, self.rows, batch)
            self.router_loss = balance.detach()
            out = out._replace(loss=out.loss + router_share * self.router.coefficient * balance)
        if self.ld_alpha is None:
            return out
        return out._replace(logp=self._joined(out.logp, self.ld_alpha))

    def logps(self, batch: PackedBatch) -> Tensor:
        """Summed log-probs of the completions of a pack, (N,) fp32 nats, without gradients."""
        with torch.set_grad_enabled(self.scores_as_it_trains):
            return self(batch.to(self.device)).logp

    def _of_joined_parts(
        self, loss_fn: LossFn, ref_logp: Tensor | None, batch: PackedBatch
    ) -> LossFn:
        """`loss_fn` as a function of the log-probs of parts; `ref_logp` is of whole completions."""

        assert self.ld_alpha is not None
        alpha = self.ld_alpha
        cu_groups = batch.cu_groups.tolist()
        lengths_2N = batch.cu_ld_parts.diff().to(self.device, non_blocking=True)

        def of_parts(
            logp_2N: Tensor,
            _: Tensor | None,
            groups: slice,
            means_2N: Mapping[str, Tensor] | None = None,
        ) -> Tensor:
            first, last = cu_groups[groups.start], cu_groups[groups.stop]
            ref = None if ref_logp is None else ref_logp[first:last]
            lengths = lengths_2N[2 * first : 2 * last]
            wholes = self._joined(lengths, 1).clamp(min=1)
            means = {
                name: self._joined(mean * lengths, 1) / wholes
                for name, mean in (means_2N or {}).items()
            }
            joined = self._joined(logp_2N, alpha)
            return loss_fn(joined, ref, groups, means, whole_logp=self._joined(logp_2N, 1.0))

        return of_parts

    @staticmethod
    def _joined(logp_2N: Tensor, share_of_rest: float) -> Tensor:
        return logp_2N[0::2] + share_of_rest * logp_2N[1::2]
