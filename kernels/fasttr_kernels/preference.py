"""Preference losses in three passes: a group's weights are found while its logits are still there.

Legend: T scored rows, N completions, G groups, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fasttr_kernels import checks, chunks, products
from fasttr_kernels.head import Head, RowLogps, Statistics
from fasttr_kernels.objective import ROWS, LossFn, Objective

P = ParamSpec("P")
R = TypeVar("R")


class PreferenceLoss(NamedTuple):
    """What `linear_preference_loss` returns, in nats, fp32 (fp64 for fp64 inputs).

    All but `loss` are detached: a term added on `logp` would train nothing. Write it into loss_fn.
    """

    loss: Tensor  # ()
    logp: Tensor  # (N,) summed log-prob of each completion
    token_logp: Tensor  # (T,)
    entropy: Tensor | None  # (T,)
    correct: Tensor | None  # (T,) bool: the target is the argmax, the first one where logits tie
    logit_mean: Tensor | None  # (T,) mean over the vocabulary of the scaled, soft-capped logits
    log_sum_squares: Tensor | None  # (T,) log sum_v p_v^2


def outside_compile(op: Callable[P, R]) -> Callable[P, R]:
    """A compiler leaves the op as it is, between two graphs. Asked for at the call, since as a
    decorator it would import the compiler with this package."""

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(op)(*args, **kwargs)
        return op(*args, **kwargs)

    return call


@outside_compile
def linear_preference_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    cu_completions: Tensor | None = None,  # (N+1,) host
    cu_groups: Tensor | int = 2,  # (G+1,) host, or completions a group
    loss_fn: LossFn | None = None,
    *,
    lengths: Sequence[int] | None = None,  # (N,) in place of cu_completions
    ref_logp: Tensor | None = None,  # (N,)
    normalizer: float | None = None,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    stats: bool = False,
    loss_reads: Collection[str] = (),
    cast_weight: Tensor | None = None,  # (V, D)
    weight_grad: Tensor | None = None,  # (V, D)
) -> PreferenceLoss:
    """A preference loss on top of a linear head, without its logits and without computing them
    twice.

    Equals `linear_preference_loss_ref`: z = softcap tanh(logit_scale (hidden weight^T + bias) /
    softcap), the log-prob of a completion is the sum over its rows of z_target - logsumexp(z), and
    loss = sum over groups of loss_fn(logp, ref_logp, groups) / normalizer, differentiable in
    hidden, weight and bias. The loss owns what lies between log-probs and loss: DPO
    (arXiv:2305.18290), IPO (2310.12036), KTO (2402.01306), ...

    Args:
        hidden, weight: bf16, fp32 or fp64, of one dtype; under `torch.autocast` the products are
            made in its dtype.
        target: vocabulary ids, all of them scored. On a GPU an id outside 0..V-1 gives NaN (no wait
            for a check).
        cu_completions: row offsets of the completions, on the host; a completion without rows has
            log-prob 0.
        cu_groups: completion offsets of the groups, on the host, or the completions of every group;
            pairs by default. A group is what must be scored before any of its weights is known: a
            pair, or the completions that a loss couples.
        loss_fn: (logp (n,), ref_logp (n,) or None, groups) -> (), the sum of the losses of
            `groups`, a slice of whole groups in order. Plain differentiable torch without
            parameters, called once a chunk. None gives log-probs only.
        lengths: rows of each completion, in place of cu_completions.
        ref_logp: log-probs under the reference, handed to loss_fn in slices.
        normalizer: a host number that divides the loss, such as the pairs of a step. None takes the
            groups of this call.
        chunk_rows: most rows of a chunk. Groups are never cut, but a longer group is scored in
            pieces, with one more pass for that group. Equal inputs and chunks give bitwise equal
            log-probs, with gradients or without. None takes 1/32 of a GPU's memory for fp32 logits,
            32 MiB on a CPU.
        stats: entropy, argmax hits and mean logits, from the sweep that makes the log-sum-exp;
            without gradient.
        loss_reads: names among `token_logp`, `entropy`, `logit_mean`, `log_sum_squares`. loss_fn is
            then called with a fourth argument, a dict of their means over the rows of each
            completion, (n,), without gradient. WPO's weight of a completion (arXiv:2406.11827) is
            exp(means["token_logp"] - means["log_sum_squares"]).
        cast_weight: `weight` in the dtype of the products, where the caller keeps a copy (cast once
            a step, not once a call). Gradients still go to `weight`.
        weight_grad: fp32 (fp64 for fp64): dW is added to it inside the product, when the loss is
            made, and `weight` itself gets no gradient and runs no hooks. The gradient of the loss
            must then be 1, once: put factors into normalizer.

    Memory: chunk_rows x V logits (fp32; and dZ in bf16 for bf16 inputs on a GPU), dX, and dW in
    fp32 from forward to backward, which hands them on without a copy unless the graph is retained.
    Gradients are made in the forward, for what requires grad: a frozen weight or hidden skips its
    product; under no_grad, or with loss_fn None, there are log-probs only. Not twice
    differentiable.
    Precision: logits, sums over the vocabulary, and dX and dW over the rows in fp32 (fp64 for
    fp64); sums over tokens in fp64. dW reaches autograd in fp32, so that a bf16 leaf whose
    `grad_dtype` is fp32 loses nothing. Deterministic: no atomics, one order of summation.
    torch.compile breaks its graph here, once.

    Raises:
        ValueError: shapes, dtypes, devices, DTensors, offsets that do not cover the rows, a loss_fn
            with parameters or that does not return a scalar, weight_grad under a checkpoint or with
            a gradient of the loss other than 1.
    """
    compute = checks.head(hidden, weight, target, bias)
    checks.head_options(logit_scale, softcap)
    checks.target_range(target, weight.shape[0])
    checks.cast_weight(cast_weight, weight, compute)
    wide = products.wide(compute)
    checks.weight_grad(weight_grad, weight, wide)
    completions = checks.completions(cu_completions, lengths, hidden.shape[0])
    groups = checks.groups(cu_groups, len(completions) - 1)
    normalizer = max(1, len(groups) - 1) if normalizer is None else normalizer
    checks.preference(ref_logp, (len(completions) - 1,), hidden.device, normalizer, chunk_rows)
    checks.loss_fn(loss_fn, loss_reads, ROWS)
    ready = weight if cast_weight is None else cast_weight
    batch = chunks.Batch(
        hidden=hidden.detach().to(compute),
        head=Head.of(ready, bias, logit_scale, softcap, compute),
        target=target.long(),
        cu_completions=completions,
        cu_groups=groups,
        chunk_rows=chunk_rows or chunks.default_rows(weight.shape[0], hidden.device),
        statistics=Statistics(
            usual=stats or "entropy" in loss_reads or "logit_mean" in loss_reads,
            log_sum_squares="log_sum_squares" in loss_reads,
        ),
    )
    objective = None
    if loss_fn is not None:
        objective = Objective(
            loss_fn=loss_fn,
            ref_logp=None if ref_logp is None else ref_logp.detach().to(wide),
            normalizer=float(normalizer),
            reads=tuple(loss_reads),
        )
    return evaluate(hidden, weight, bias, batch, objective, weight_grad)


class Weighing(Protocol):
    """A loss with what it is called with, as a chunk asks it."""

    def weigh(
        self, want: bool, chunk: chunks.Chunk, logp_n: Tensor, rows_C: RowLogps
    ) -> chunks.Weights:
        """The loss of a chunk's groups over the normalizer and, with `want`, its gradient."""
        ...


def evaluate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: chunks.Batch,
    objective: Weighing | None,
    weight_grad: Tensor | None = None,
) -> PreferenceLoss:
    """Log-probs, and with an objective its loss, differentiable where something asks for it."""
    differentiable = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        # Inside forward gradients are always off, so this is the place to look.
        if objective is not None and torch.is_grad_enabled() and differentiable:
            out = _Preference.apply(hidden, weight, bias, batch, objective, weight_grad)
            return PreferenceLoss(*out)
        return _run(batch, objective, _no_gradients(batch))


def _no_gradients(batch: chunks.Batch) -> chunks.Grads:
    return chunks.Grads(batch.hidden, batch.head, chunks.NO_GRADIENTS, batch.hidden.dtype)


def _run(batch: chunks.Batch, objective: Weighing | None, grads: chunks.Grads) -> PreferenceLoss:
    weigh = None if objective is None else functools.partial(objective.weigh, grads.wanted)
    out = chunks.run(batch, weigh, grads)
    return PreferenceLoss(
        loss=out.loss,
        logp=out.logp,
        token_logp=out.rows.logp,
        entropy=out.rows.entropy,
        correct=out.rows.correct,
        logit_mean=out.rows.mean,
        log_sum_squares=out.rows.log_sum_squares,
    )


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: chunks.Batch,
        objective: Weighing,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        if weight_grad is not None:
            checks.outside_backward()
        wanted = chunks.Wanted(*ctx.needs_input_grad[:3])
        grads = chunks.Grads(batch.hidden, batch.head, wanted, hidden.dtype, weight_grad)
        out = _run(batch, objective, grads)
        # Not saved for backward: hooks that move activations elsewhere would take dW along.
        ctx.grads = grads.done()
        ctx.once = weight_grad is not None
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_preference_loss: got a second backward; wanted the first one to keep what "
                "it hands out; pass retain_graph=True there (not possible with weight_grad)"
            )
        if ctx.once:
            checks.unit_gradient(d_loss)
        retained = torch._C._autograd._get_current_graph_task_keep_graph() and not ctx.once
        grads = tuple(None if g is None else _times(g, d_loss, retained) for g in ctx.grads)
        if not retained:
            ctx.grads = None
        return *grads, None, None, None


def _times(grad: Tensor, by: Tensor, retained: bool) -> Tensor:
    """A gradient for the result's gradient `by`, in place where no second backward can ask."""
    if retained:
        return (grad * by).to(grad.dtype)
    chunks.select(grad.device).scale_(grad, by)
    return grad


def linear_preference_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_completions: Tensor | None = None,
    cu_groups: Tensor | int = 2,
    loss_fn: LossFn | None = None,
    *,
    lengths: Sequence[int] | None = None,
    ref_logp: Tensor | None = None,
    normalizer: float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    stats: bool = False,
    loss_reads: Collection[str] = (),
) -> PreferenceLoss:
    """The specification, in plain torch with the whole logits, in the dtype of the arguments."""
    completions = checks.completions(cu_completions, lengths, hidden.shape[0])
    G = len(checks.groups(cu_groups, len(completions) - 1)) - 1
    z = nn.functional.linear(hidden, weight, bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprobs = z.log_softmax(-1)
    token_logp = logprobs.gather(1, target.long()[:, None])[:, 0]
    spans = list(itertools.pairwise(completions))
    logp = torch.stack([token_logp[:0].sum(), *(token_logp[a:b].sum() for a, b in spans)])[1:]
    names = {*loss_reads, "token_logp", *(("entropy", "logit_mean") if stats else ())}
    rows = {name: _row_statistic(name, z, logprobs, token_logp).detach() for name in names}
    loss = logp.new_zeros(())
    if loss_fn is not None:
        means = {n: torch.stack([rows[n][a:b].mean() for a, b in spans]) for n in loss_reads}
        total = loss_fn(logp, ref_logp, slice(0, G), *([means] if loss_reads else []))
        loss = total / (max(1, G) if normalizer is None else normalizer)
    return PreferenceLoss(
        loss=loss,
        logp=logp.detach(),
        token_logp=rows["token_logp"],
        entropy=rows.get("entropy"),
        correct=z.argmax(-1) == target if stats else None,
        logit_mean=rows.get("logit_mean"),
        log_sum_squares=rows.get("log_sum_squares"),
    )


def _row_statistic(name: str, z: Tensor, logprobs: Tensor, token_logp: Tensor) -> Tensor:
    match name:
        case "entropy":
            p = logprobs.exp()
            return -torch.xlogy(p, p).sum(-1)
        case "logit_mean":
            return z.mean(-1)
        case "log_sum_squares":
            return (2 * logprobs).logsumexp(-1)
        case _:
            return token_logp
