"""The loss heads that `bench head` compares: each maps hidden states to a loss and its gradients.

Objectives: `preference` (DPO on summed log-probs), `kto`, and `cross_entropy` (the
mean over tokens), for heads that know no weight per sequence.

Legend: T rows, N completions, L rows of the longest one, V vocabulary, D hidden size.
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

from bench.head_problem import BETA, Gradients, Leaf, Problem, dpo

IGNORED = -100


class Output(NamedTuple):
    loss: Tensor
    logp: Tensor | None  # (N,) where the head gives it


class Attempt(NamedTuple):
    """A head that is ready for a problem: what was laid out for it is not timed."""

    forward: Callable[[], Output]
    hidden: Tensor  # the leaf that gradients of hidden states arrive at
    as_rows: Callable[[Tensor], Tensor] = lambda gradient: gradient  # of that leaf -> (T, D)


@dataclass(frozen=True)
class Provider:
    """A head. `passes` counts its T x V x D products, forward and backward, without the
    reference."""

    prepare: Callable[[Problem], Attempt]
    objective: str
    passes: float
    needs: tuple[str, ...] = ()  # packages
    cuda_only: bool = False
    into_gradient: bool = False  # adds to a gradient that is there already

    def absent(self, device: torch.device, leaf: Leaf) -> str | None:
        """Why it cannot run here, or None."""
        missing = [package for package in self.needs if importlib.util.find_spec(package) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self.cuda_only and device.type != "cuda":
            return "needs a GPU"
        if self.into_gradient and not leaf.accumulates:
            return "needs a gradient that is there already"
        return None


def step(attempt: Attempt, problem: Problem) -> Output:
    """Forward and backward into the leaves, as a trainer's micro-batch: what is timed."""
    leaf = problem.leaf
    attempt.hidden.grad = None
    if not leaf.accumulates:
        problem.weight.grad = None
    with torch.autocast(problem.hidden.device.type, torch.bfloat16, enabled=leaf.autocast):
        out = attempt.forward()
    out.loss.backward()
    return out


def gradients(attempt: Attempt, problem: Problem) -> Gradients:
    """What one micro-batch gives, from a weight whose gradient is 0."""
    accumulates = problem.leaf.accumulates
    problem.weight.grad = torch.zeros_like(problem.weight) if accumulates else None
    out = step(attempt, problem)
    assert attempt.hidden.grad is not None
    assert problem.weight.grad is not None
    return Gradients(
        loss=out.loss.detach(),
        logp=None if out.logp is None else out.logp.detach(),
        hidden=attempt.as_rows(attempt.hidden.grad),
        weight=problem.weight.grad.clone(),
    )


TokenLogp = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, target -> (T,)


def _preference(
    token_logp: TokenLogp, of_reference: TokenLogp | None = None
) -> Callable[[Problem], Attempt]:
    """DPO on top of functions that give log-probs of tokens."""
    score = of_reference or token_logp

    def prepare(p: Problem) -> Attempt:
        def forward() -> Output:
            ref_N = None
            if p.ref_hidden is not None and p.ref_weight is not None:
                with torch.no_grad():
                    ref_N = p.summed(score(p.ref_hidden, p.ref_weight, p.target))
            logp_N = p.summed(token_logp(p.hidden, p.weight, p.target))
            return Output(dpo(logp_N, ref_N), logp_N)

        return Attempt(forward, p.hidden)

    return prepare


def _cross_entropy(function: TokenLogp) -> Callable[[Problem], Attempt]:
    def prepare(p: Problem) -> Attempt:
        return Attempt(lambda: Output(function(p.hidden, p.weight, p.target), None), p.hidden)

    return prepare


def _pair_loss(logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
    ratio = logp if ref_logp is None else logp - ref_logp
    return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).sum()


def _fused(*, stats: bool = True, into_gradient: bool = False) -> Callable[[Problem], Attempt]:
    """fasttr's op; `stats` as the trainer asks for them."""

    def prepare(p: Problem) -> Attempt:
        # A caller that adds into the gradient also keeps a cast of the weight, once a step.
        cast = p.weight.detach().to(p.leaf.compute) if into_gradient else None

        def forward() -> Output:
            ref_N = None
            if p.ref_hidden is not None and p.ref_weight is not None:
                with torch.no_grad():
                    ref_N = linear_preference_loss(
                        p.ref_hidden, p.ref_weight, p.target, lengths=p.lengths
                    ).logp
            out = linear_preference_loss(
                p.hidden,
                p.weight,
                p.target,
                lengths=p.lengths,
                loss_fn=_pair_loss,
                ref_logp=ref_N,
                stats=stats,
                cast_weight=cast,
                weight_grad=p.weight.grad if into_gradient else None,
            )
            return Output(out.loss, out.logp)

        return Attempt(forward, p.hidden)

    return prepare


def eager_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return logits.float().log_softmax(-1).gather(1, target[:, None])[:, 0]


@cache
def _compiled() -> Any:
    return torch.compile(eager_logp)


def _trl(outputs: tuple[str, ...]) -> TokenLogp:
    """TRL's head with the statistics that its DPOTrainer asks for."""

    def token_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

        arguments = (hidden, weight, None, target, 1.0, width, None, 1.0, outputs)
        return ChunkedLogProbFunction.apply(*arguments)[0]

    return token_logp


class _Padded(NamedTuple):
    """A problem as Liger's heads take it: all chosen completions, then all rejected ones, padded to
    the longest."""

    hidden: Tensor  # (N, L, D)
    target: Tensor  # (N, L)
    ref_hidden: Tensor | None
    place_T: Tensor  # of every row in (N * L)
    order_N: Tensor  # place of every completion

    @classmethod
    def of(cls, p: Problem) -> _Padded:
        number, longest = len(p.lengths), max(p.lengths)
        device = p.hidden.device
        order_N = torch.arange(number).view(2, -1).t().flatten()
        first = (order_N * longest).tolist()
        runs = [torch.arange(n) + start for n, start in zip(p.lengths, first, strict=True)]
        place_T = torch.cat(runs).to(device)

        def padded(rows: Tensor, fill: int) -> Tensor:
            out = rows.new_full((number * longest, *rows.shape[1:]), fill)
            out[place_T] = rows.detach()
            return out.view(number, longest, *rows.shape[1:])

        return cls(
            hidden=padded(p.hidden, 0).requires_grad_(),
            target=padded(p.target, IGNORED),
            ref_hidden=None if p.ref_hidden is None else padded(p.ref_hidden, 0),
            place_T=place_T,
            order_N=order_N.to(device),
        )

    def as_rows(self, gradient: Tensor) -> Tensor:
        return gradient.flatten(0, 1)[self.place_T]


def _liger_dpo(p: Problem) -> Attempt:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    padded = _Padded.of(p)
    head = LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=p.ref_hidden is not None, compiled=p.hidden.is_cuda
    )

    def forward() -> Output:
        loss, (chosen, rejected, *_) = head(
            p.weight,
            padded.hidden,
            padded.target,
            ref_input=padded.ref_hidden,
            ref_weight=p.ref_weight,
        )
        return Output(loss, torch.cat([chosen, rejected])[padded.order_N])

    return Attempt(forward, padded.hidden, padded.as_rows)


def _liger_kto(p: Problem) -> Attempt:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    padded = _Padded.of(p)
    device = p.hidden.device
    is_desirable = torch.arange(len(p.lengths), device=device) < len(p.lengths) // 2
    head = LigerFusedLinearKTOLoss(
        beta=BETA, use_ref_model=p.ref_hidden is not None, compiled=p.hidden.is_cuda
    )

    def forward() -> Output:
        loss, *_ = head(
            padded.hidden,
            p.weight,
            padded.target,
            None,
            is_desirable,
            ref_input=padded.ref_hidden,
            ref_weight=p.ref_weight,
            kl=torch.zeros((), device=device),
        )
        return Output(loss, None)

    return Attempt(forward, padded.hidden, padded.as_rows)


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
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def _linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_logprob(hidden, weight, target, stats=True).logp


def _compiled_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _compiled()(hidden, weight, target)


_trl_head = _preference(_trl(("entropy", "mean_logits", "is_top1")), of_reference=_trl(()))
LIGER, CCE, QUACK = ("liger_kernel",), ("cut_cross_entropy",), ("quack",)

PROVIDERS = {
    "fasttr": Provider(_fused(), "preference", 3),
    "fasttr into .grad": Provider(_fused(into_gradient=True), "preference", 3, into_gradient=True),
    "fasttr without statistics": Provider(_fused(stats=False), "preference", 3),
    "fasttr linear_logprob": Provider(_preference(_linear_logprob), "preference", 4),
    "eager": Provider(_preference(eager_logp), "preference", 3),
    "torch.compile": Provider(_preference(_compiled_logp), "preference", 3),
    "TRL": Provider(_trl_head, "preference", 4, ("trl",)),
    "Liger chunked DPO": Provider(_liger_dpo, "preference", 3, LIGER),
    "Liger chunked KTO": Provider(_liger_kto, "kto", 3, LIGER),
    "Liger fused linear CE": Provider(_cross_entropy(_liger_ce), "cross_entropy", 3, LIGER, True),
    "cut-cross-entropy": Provider(_cross_entropy(_cce), "cross_entropy", 4, CCE, True),
    "QuACK": Provider(_cross_entropy(_quack), "cross_entropy", 3, QUACK, True),
    "torch linear_cross_entropy": Provider(_cross_entropy(_torch_ce), "cross_entropy", 3),
}


def absent(name: str, device: torch.device, leaf: Leaf) -> str | None:
    """Why a provider cannot run here, or None."""
    if name == "torch linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none"
    return PROVIDERS[name].absent(device, leaf)
