"""Preference losses in three passes: a group's weights are found while its logits are still there.

Legend: T scored rows, N completions, G groups, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttr_kernels import checks, chunks, products
from fasttr_kernels.head import Head, RowLogps, Statistics

# (logp (n,), ref_logp (n,) or None, groups) -> (); with `loss_reads` also a dict of means (n,).
LossFn = Callable[..., Tensor]
# Statistics of rows that a loss may read, and where a sweep leaves them.
ROWS = {
    "token_logp": "logp",
    "entropy": "entropy",
    "logit_mean": "mean",
    "log_sum_squares": "log_sum_squares",
}


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


class _Objective(NamedTuple):
    """The loss of a batch, after its checks."""

    loss_fn: LossFn
    ref_logp: Tensor | None
    normalizer: float
    reads: tuple[str, ...]

    def weigh(
        self, want: bool, chunk: chunks.Chunk, logp_n: Tensor, rows_C: RowLogps
    ) -> chunks.Weights:
        """loss_fn of a chunk's groups over the normalizer and its gradient, on vectors of a few
        numbers."""
        ref_n = None if self.ref_logp is None else self.ref_logp[chunk.completions]
        arguments: list[Any] = [ref_n, chunk.groups]
        if self.reads:
            arguments.append(_means(self.reads, rows_C, chunk.cu))
        # Hooks of a checkpoint around the op would otherwise pack, and so run, this little graph
        # once more.
        neutral = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        without_autocast = torch.autocast(logp_n.device.type, enabled=False)
        with torch.set_grad_enabled(want), neutral, without_autocast:
            leaf_n = logp_n.detach().clone().requires_grad_(want)
            loss = self.loss_fn(leaf_n, *arguments)
            _check_loss(loss, leaf_n, want)
            weight_n = None
            if want and loss.requires_grad:
                (weight_n,) = torch.autograd.grad(loss, leaf_n, allow_unused=True)
        loss = loss.detach() / self.normalizer
        if not want:
            return chunks.Weights(loss)
        if weight_n is None:
            return chunks.Weights(loss, completion=torch.zeros_like(logp_n))
        return chunks.Weights(loss, completion=weight_n / self.normalizer)


def _means(reads: tuple[str, ...], rows_C: RowLogps, cu: list[int]) -> dict[str, Tensor]:
    """Means over each completion of what its rows gave, by the names of PreferenceLoss."""
    return {name: chunks.segment_mean(getattr(rows_C, ROWS[name]), cu) for name in reads}


def _check_loss(loss: Any, leaf: Tensor, want: bool) -> None:
    if not isinstance(loss, Tensor):
        got = type(loss).__name__
    elif loss.dim() != 0 or not loss.is_floating_point():
        got = f"{loss.dtype} {tuple(loss.shape)}"
    elif want and _reaches_other_leaf(loss, leaf):
        raise checks.fail(
            "loss_fn",
            "a loss that depends on another tensor that requires grad",
            "a function of logp and ref_logp",
            "detach it: it would get no gradient",
        )
    else:
        return
    raise checks.fail(
        "loss_fn", got, "a floating-point scalar ()", "return the sum of the groups' losses"
    )


def _reaches_other_leaf(loss: Tensor, leaf: Tensor) -> bool:
    seen: set[Any] = set()
    front = [loss.grad_fn]
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            return True
        front.extend(n for n, _ in node.next_functions)
    return loss.grad_fn is None and loss.requires_grad and loss is not leaf


def _run(batch: chunks.Batch, objective: _Objective | None, grads: chunks.Grads) -> PreferenceLoss:
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
        objective: _Objective,
    ) -> tuple[Tensor | None, ...]:
        wanted = chunks.Wanted(*ctx.needs_input_grad[:3])
        grads = chunks.Grads(batch.hidden, batch.head, wanted, hidden.dtype)
        out = _run(batch, objective, grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(*grads.done())
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # On a CPU the comparison is free and saves a sweep over dW; on a GPU it would wait for the
        # device.
        unit = d_loss.device.type == "cpu" and bool(d_loss == 1)
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(_scaled(grad, d_loss, dtype, unit) for grad, dtype in grads), None, None


def _scaled(grad: Tensor | None, by: Tensor, dtype: torch.dtype, unit: bool) -> Tensor | None:
    if grad is None or (unit and grad.dtype == dtype):
        return grad
    return torch.mul(grad, by, out=torch.empty_like(grad, dtype=dtype))


def linear_preference_loss(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    cu_completions: Tensor,  # (N+1,) host
    cu_groups: Tensor,  # (G+1,) host
    loss_fn: LossFn | None,
    *,
    ref_logp: Tensor | None,  # (N,)
    normalizer: float,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    stats: bool = False,
    loss_reads: Collection[str] = (),
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
        cu_groups: completion offsets of the groups, on the host. A group is what must be scored
            before any of its weights is known: a pair, or the completions that a loss couples.
        loss_fn: (logp (n,), ref_logp (n,) or None, groups) -> (), the sum of the losses of
            `groups`, a slice of whole groups in order. Plain differentiable torch without
            parameters, called once a chunk. None scores only.
        ref_logp: log-probs under the reference, handed to loss_fn in slices.
        normalizer: a host number that divides the loss, such as the pairs of a step.
        chunk_rows: most rows of a chunk. Groups are never cut, but a longer group is scored in
            pieces, with one more pass for that group. Equal inputs and chunks give bitwise equal
            log-probs, with gradients or without.
        stats: entropy, argmax hits and mean logits, from the sweep that makes the log-sum-exp;
            without gradient.
        loss_reads: names among `token_logp`, `entropy`, `logit_mean`, `log_sum_squares`. loss_fn is
            then called with a fourth argument, a dict of their means over the rows of each
            completion, (n,), without gradient. WPO's weight of a completion (arXiv:2406.11827) is
            exp(means["token_logp"] - means["log_sum_squares"]).

    Memory: chunk_rows x V logits (fp32; and dZ in bf16 for bf16 inputs on a GPU), dX, and dW in
    fp32 from forward to backward. Gradients are made in the forward, for what requires grad: a
    frozen weight or hidden skips its product; under no_grad, or with loss_fn None, there are scores
    only. Not twice differentiable.
    Precision: logits, sums over the vocabulary, and dX and dW over the rows in fp32 (fp64 for
    fp64); sums over tokens in fp64. Deterministic: no atomics, one order of summation.
    torch.compile breaks its graph here, once.

    Raises:
        ValueError: shapes, dtypes, devices, offsets that do not cover the rows, a loss_fn with
            parameters or that does not return a scalar.
    """
    op = _outside_compile() if torch.compiler.is_compiling() else _linear_preference_loss
    return op(
        hidden,
        weight,
        target,
        cu_completions,
        cu_groups,
        loss_fn,
        ref_logp,
        normalizer,
        bias,
        logit_scale,
        softcap,
        chunk_rows,
        stats,
        tuple(loss_reads),
    )


@functools.cache
def _outside_compile() -> Any:
    # Made when a compiler asks: as a decorator it would import the compiler with this package.
    return torch.compiler.disable(_linear_preference_loss)


def _linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_completions: Tensor,
    cu_groups: Tensor,
    loss_fn: LossFn | None,
    ref_logp: Tensor | None,
    normalizer: float,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    chunk_rows: int | None,
    stats: bool,
    loss_reads: tuple[str, ...],
) -> PreferenceLoss:
    compute = checks.head(hidden, weight, target, bias)
    checks.head_options(logit_scale, softcap)
    checks.target_range(target, weight.shape[0])
    completions = checks.offsets(
        "cu_completions", cu_completions, hidden.shape[0], "every row of hidden"
    )
    N = len(completions) - 1
    groups = checks.offsets("cu_groups", cu_groups, N, "every completion")
    if ref_logp is not None and (ref_logp.shape != (N,) or ref_logp.device != hidden.device):
        raise checks.fail(
            "ref_logp",
            f"shape {tuple(ref_logp.shape)} on {ref_logp.device}",
            f"({N},) on {hidden.device}",
            "one summed log-prob for each completion",
        )
    if isinstance(normalizer, bool | Tensor) or not (math.isfinite(normalizer) and normalizer > 0):
        raise checks.fail(
            "normalizer", normalizer, "a host number above 0", "pass the step's count of groups"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise checks.fail(
            "chunk_rows", chunk_rows, "at least 1, or None", "None takes the measured default"
        )
    unknown = sorted(set(loss_reads) - set(ROWS))
    if unknown:
        raise checks.fail("loss_reads", unknown, f"names among {sorted(ROWS)}", "drop the others")
    if isinstance(loss_fn, nn.Module) and next(loss_fn.parameters(), None) is not None:
        raise checks.fail(
            "loss_fn",
            "a module with parameters",
            "a function without parameters",
            "its parameters would get no gradient: compute that term outside",
        )
    batch = chunks.Batch(
        hidden=hidden.detach().to(compute),
        head=Head.of(weight, bias, logit_scale, softcap, compute),
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
        wide = products.wide(compute)
        objective = _Objective(
            loss_fn=loss_fn,
            ref_logp=None if ref_logp is None else ref_logp.detach().to(wide),
            normalizer=float(normalizer),
            reads=loss_reads,
        )
    differentiable = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        # Inside forward gradients are always off, so this is the place to look.
        if objective is not None and torch.is_grad_enabled() and differentiable:
            return PreferenceLoss(*_Preference.apply(hidden, weight, bias, batch, objective))
        none = chunks.Grads(batch.hidden, batch.head, chunks.NO_GRADIENTS, hidden.dtype)
        return _run(batch, objective, none)


def linear_preference_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_completions: Tensor,
    cu_groups: Tensor,
    loss_fn: LossFn | None,
    *,
    ref_logp: Tensor | None,
    normalizer: float,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    stats: bool = False,
    loss_reads: Collection[str] = (),
) -> PreferenceLoss:
    """The specification, in plain torch with the whole logits, in the dtype of the arguments."""
    z = nn.functional.linear(hidden, weight, bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprobs = z.log_softmax(-1)
    token_logp = logprobs.gather(1, target.long()[:, None])[:, 0]
    spans = list(itertools.pairwise(cu_completions.tolist()))
    logp = torch.stack([token_logp[:0].sum(), *(token_logp[a:b].sum() for a, b in spans)])[1:]
    p = logprobs.exp()
    rows = {
        "token_logp": token_logp.detach(),
        "entropy": -torch.xlogy(p, p).sum(-1).detach(),
        "logit_mean": z.mean(-1).detach(),
        "log_sum_squares": (2 * logprobs).logsumexp(-1).detach(),
    }
    loss = logp.new_zeros(())
    if loss_fn is not None:
        means = {n: torch.stack([rows[n][a:b].mean() for a, b in spans]) for n in loss_reads}
        groups = slice(0, cu_groups.numel() - 1)
        loss = loss_fn(logp, ref_logp, groups, *([means] if loss_reads else [])) / normalizer
    return PreferenceLoss(
        loss=loss,
        logp=logp.detach(),
        token_logp=rows["token_logp"],
        entropy=rows["entropy"] if stats or "entropy" in loss_reads else None,
        correct=z.argmax(-1) == target if stats else None,
        logit_mean=rows["logit_mean"] if stats else None,
        log_sum_squares=rows["log_sum_squares"] if "log_sum_squares" in loss_reads else None,
    )
