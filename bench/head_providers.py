"""The loss heads that `bench head` compares: each maps hidden states to a loss and its gradients.

Two objectives: `preference` (DPO on summed log-probs, with beta 0.1) and `cross_entropy` (the mean
over tokens), for heads that know no weight per sequence.

Legend: T rows, N completions of L rows each, V vocabulary, D hidden size. Chosen completions come
first, then rejected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fasttr_kernels import linear_logprob, linear_preference_loss
from torch import Tensor

BETA = 0.1


class Problem(NamedTuple):
    """Leaves of one case; `ref_hidden` and `ref_weight` are None where the reference's log-probs
    are 0."""

    hidden: Tensor  # (T, D), requires grad
    weight: Tensor  # (V, D), requires grad
    target: Tensor  # (T,)
    completions: int  # N
    ref_hidden: Tensor | None
    ref_weight: Tensor | None

    @property
    def length(self) -> int:
        return self.hidden.shape[0] // self.completions


class Output(NamedTuple):
    loss: Tensor
    logp: Tensor | None  # (N,) where the head gives it


@dataclass(frozen=True)
class Provider:
    """A head. `passes` counts its T x V x D products, forward and backward, without the
    reference."""

    call: Callable[[Problem], Output]
    objective: str
    passes: float
    needs: tuple[str, ...] = ()  # packages
    cuda_only: bool = False

    def absent(self, device: torch.device) -> str | None:
        missing = [p for p in self.needs if importlib.util.find_spec(p) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        return "needs a GPU" if self.cuda_only and device.type != "cuda" else None


def dpo(logp_N: Tensor, ref_logp_N: Tensor | None) -> Tensor:
    """Mean over pairs; chosen first, then rejected."""
    ratio = logp_N if ref_logp_N is None else logp_N - ref_logp_N
    chosen, rejected = ratio.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _preference(
    token_logp: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Problem], Output]:
    """DPO on top of a function that gives log-probs of tokens."""

    def call(p: Problem) -> Output:
        ref_N = None
        if p.ref_hidden is not None and p.ref_weight is not None:
            with torch.no_grad():
                ref_N = (
                    token_logp(p.ref_hidden, p.ref_weight, p.target).view(p.completions, -1).sum(1)
                )
        logp_N = token_logp(p.hidden, p.weight, p.target).view(p.completions, -1).sum(1)
        return Output(dpo(logp_N, ref_N), logp_N)

    return call


def _cross_entropy(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Problem], Output]:
    return lambda p: Output(function(p.hidden, p.weight, p.target), None)


def _fused(p: Problem) -> Output:
    pairs, length = p.completions // 2, p.length
    # Pairs side by side, as a pack has them.
    order = torch.arange(p.completions).view(2, pairs).t().reshape(-1)
    place = lambda x: x.view(p.completions, length, *x.shape[1:])[order].flatten(0, 1)  # noqa: E731
    cu_completions = torch.arange(p.completions + 1) * length
    cu_groups = torch.arange(pairs + 1) * 2
    target = place(p.target)
    ref_N = None
    if p.ref_hidden is not None and p.ref_weight is not None:
        with torch.no_grad():
            ref_N = linear_preference_loss(
                place(p.ref_hidden),
                p.ref_weight,
                target,
                cu_completions,
                cu_groups,
                None,
                ref_logp=None,
                normalizer=1,
            ).logp

    def loss_fn(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        ratio = logp if ref_logp is None else logp - ref_logp
        return -F.logsigmoid(BETA * (ratio[::2] - ratio[1::2])).sum()

    out = linear_preference_loss(
        place(p.hidden),
        p.weight,
        target,
        cu_completions,
        cu_groups,
        loss_fn,
        ref_logp=ref_N,
        normalizer=pairs,
    )
    back = torch.empty_like(out.logp)
    back[order.to(back.device)] = out.logp
    return Output(out.loss, back)


def eager_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, target[:, None])[:, 0]


@cache
def _compiled() -> Any:
    return torch.compile(eager_logp)


def _trl_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    return ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, width, None, 1.0, ())[0]


def _liger_dpo(p: Problem) -> Output:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    with_reference = p.ref_hidden is not None
    head = LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=with_reference, compiled=p.hidden.is_cuda
    )
    shape = (p.completions, p.length, -1)
    ref = None if p.ref_hidden is None else p.ref_hidden.view(shape)
    loss, (chosen, rejected, *_) = head(
        p.weight,
        p.hidden.view(shape),
        p.target.view(p.completions, -1),
        ref_input=ref,
        ref_weight=p.ref_weight,
    )
    return Output(loss, torch.cat([chosen, rejected]))


def _liger_kto(p: Problem) -> Output:
    """KTO with its baseline at 0, the first half desirable: its own objective, beside that of
    DPO."""
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    head = LigerFusedLinearKTOLoss(
        beta=BETA, use_ref_model=p.ref_hidden is not None, compiled=p.hidden.is_cuda
    )
    shape = (p.completions, p.length, -1)
    labels = torch.arange(p.completions, device=p.hidden.device) < p.completions // 2
    ref = None if p.ref_hidden is None else p.ref_hidden.view(shape)
    loss, *_ = head(
        p.hidden.view(shape),
        p.weight,
        p.target.view(p.completions, -1),
        None,
        labels,
        ref_input=ref,
        ref_weight=p.ref_weight,
        kl=torch.zeros((), device=p.hidden.device),
    )
    return Output(loss, None)


def _liger_ce(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)


def _cce(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target)


def _quack(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target)


def _torch_ce(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions()
    )


PROVIDERS = {
    "fasttr": Provider(_fused, "preference", 3),
    "fasttr linear_logprob": Provider(
        _preference(lambda h, w, t: linear_logprob(h, w, t).logp), "preference", 4
    ),
    "eager": Provider(_preference(eager_logp), "preference", 3),
    "torch.compile": Provider(_preference(lambda h, w, t: _compiled()(h, w, t)), "preference", 3),
    "TRL": Provider(_preference(_trl_logp), "preference", 4, ("trl",)),
    "Liger chunked DPO": Provider(_liger_dpo, "preference", 3, ("liger_kernel",)),
    "Liger chunked KTO": Provider(_liger_kto, "kto", 3, ("liger_kernel",)),
    "Liger fused linear CE": Provider(
        _cross_entropy(_liger_ce), "cross_entropy", 3, ("liger_kernel",), True
    ),
    "cut-cross-entropy": Provider(
        _cross_entropy(_cce), "cross_entropy", 4, ("cut_cross_entropy",), True
    ),
    "QuACK": Provider(_cross_entropy(_quack), "cross_entropy", 3, ("quack",), True),
    "torch linear_cross_entropy": Provider(_cross_entropy(_torch_ce), "cross_entropy", 3),
}


def installed(name: str, device: torch.device) -> str | None:
    """Why a provider cannot run here, or None."""
    if name == "torch linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none"
    return PROVIDERS[name].absent(device)


def objective(kind: str, p: Problem, token_logp_T: Tensor, ref_logp_N: Tensor | None) -> Tensor:
    """The loss of an objective from log-probs of tokens: the specification that every head is held
    to."""
    if kind == "cross_entropy":
        return -token_logp_T.mean()
    logp_N = token_logp_T.view(p.completions, -1).sum(1)
    if kind == "preference":
        return dpo(logp_N, ref_logp_N)
    rewards = BETA * (logp_N if ref_logp_N is None else logp_N - ref_logp_N)
    desirable, undesirable = rewards.chunk(2)
    return torch.cat([1 - desirable.sigmoid(), 1 - (-undesirable).sigmoid()]).mean()
