"""Per-token log-probs of a linear head without its logits: the general op, for any upstream
gradient.

Legend: T rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from fasttr_kernels import checks, chunks, products
from fasttr_kernels.head import Head, RowLogps, Statistics

P = ParamSpec("P")


class Logprob(NamedTuple):
    """What `linear_logprob` returns, in nats, fp32 (fp64 for fp64 inputs)."""

    logp: Tensor  # (T,)
    lse: Tensor  # (T,)
    entropy: Tensor | None  # (T,)
    correct: Tensor | None  # (T,) bool: the target is the argmax, the first one where logits tie
    logit_mean: Tensor | None  # (T,) mean over the vocabulary of z, without gradient
    log_sum_squares: Tensor | None  # (T,) log sum_v p_v^2, without gradient


def _without_autocast(op: Callable[P, tuple[Tensor, ...]]) -> Callable[P, tuple[Tensor, ...]]:
    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, ...]:
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.autocast(device.type, enabled=False):
            return op(*args, **kwargs)

    return run


@_without_autocast
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    cast_weight: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    stats: bool,
    squares: bool,
    compute: torch.dtype,
) -> tuple[Tensor, ...]:
    """(logp, lse, top, total, entropy, correct, logit_mean, log_sum_squares), empty where not asked
    for."""
    ready = weight if cast_weight is None else cast_weight
    head = Head.of(ready, bias, logit_scale, softcap, compute)
    rows = chunks.select(hidden.device)
    T = hidden.shape[0]
    step = chunks.default_rows(weight.shape[0], hidden.device)
    ignored, seen = _targets(target, ignore_index)
    work = rows.Workspace(min(step, T), step, head, stats, False)
    out = _outputs(hidden, Statistics(stats, squares), compute)
    for piece in chunks.pieces(0, T, step):
        rows.row_logps(hidden[piece].to(compute), head, seen[piece], work, out.part(piece))
    lse = out.top + out.total.log()
    out.logp.masked_fill_(ignored, 0.0)
    if out.correct is not None:
        out.correct.logical_and_(~ignored)
    return _flat(out, lse)


def _outputs(hidden: Tensor, statistics: Statistics, compute: torch.dtype) -> RowLogps:
    return RowLogps.empty(hidden.device, hidden.shape[0], products.wide(compute), statistics)


def _flat(out: RowLogps, lse: Tensor) -> tuple[Tensor, ...]:
    """What the registered op returns: tensors alone, empty for what was not asked for."""
    correct = out.logp.new_empty(0, dtype=torch.bool) if out.correct is None else out.correct
    # Each its own: the results of an op may not share memory.
    entropy, mean, squares = (
        out.logp.new_empty(0) if x is None else x
        for x in (out.entropy, out.mean, out.log_sum_squares)
    )
    return out.logp, lse, out.top, out.total, entropy, correct, mean, squares


def _targets(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    ignored = target == ignore_index
    return ignored, target.long().masked_fill(ignored, 0)


@_without_autocast
def _backward(
    d_logp: Tensor | None,
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    top: Tensor,
    total: Tensor,
    entropy: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    compute: torch.dtype,
    want: list[bool],
) -> tuple[Tensor, ...]:
    """(dX, dW, db), each empty where not wanted, chunk by chunk: dZ = d_logp (onehot - p) + d_lse p
    - d_entropy p (log p + entropy)."""
    head = Head.of(weight, bias, logit_scale, softcap, compute)
    rows = chunks.select(hidden.device)
    T = hidden.shape[0]
    step = chunks.default_rows(weight.shape[0], hidden.device)
    ignored, seen = _targets(target, ignore_index)
    on_target = torch.zeros_like(top) if d_logp is None else d_logp.masked_fill(ignored, 0.0)
    on_softmax = on_target if d_lse is None else on_target - d_lse
    if d_entropy is not None:
        on_softmax = on_softmax + d_entropy * (entropy - total.log())
    hidden_c = hidden.to(compute)
    grads = chunks.Grads(hidden_c, head, chunks.Wanted(*want), hidden.dtype)
    work = rows.Workspace(min(step, T), step, head, False, True)
    found = RowLogps(logp, top, total, None, None, None, None)
    for piece in chunks.pieces(0, T, step):
        logps = found.part(piece)
        rows.refill(hidden_c[piece], head, logps, work)
        dz, factor = rows.logit_grad(
            logps,
            head,
            seen[piece],
            on_target[piece],
            on_softmax[piece],
            work,
            None if d_entropy is None else d_entropy[piece],
        )
        grads.add(dz, factor, hidden_c[piece], head.weight, piece)
    wide = products.wide(compute)
    dtypes = (hidden.dtype, wide, wide)
    return tuple(
        hidden.new_empty(0, dtype=dtype) if g is None else g
        for g, dtype in zip(grads.done(), dtypes, strict=True)
    )


_OPTIONS = "int ignore_index, float logit_scale, float? softcap"
_EIGHT, _THREE = (f"({', '.join(['Tensor'] * n)})" for n in (8, 3))
# Custom ops, so that torch.compile takes them whole, with the autograd below.
_forward_op = torch.library.custom_op(
    "fasttr::linear_logprob",
    _forward,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? cast_weight, "
    f"{_OPTIONS}, bool stats, bool squares, ScalarType compute) -> {_EIGHT}",
)
_backward_op = torch.library.custom_op(
    "fasttr::linear_logprob_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor? d_logp, Tensor? d_lse, Tensor? d_entropy, Tensor hidden, Tensor weight, "
    "Tensor target, Tensor? bias, Tensor logp, Tensor top, Tensor total, Tensor entropy, "
    f"{_OPTIONS}, ScalarType compute, bool[] want) -> {_THREE}",
)


@_forward_op.register_fake
def _(hidden, weight, target, bias, cast_weight, ignore, scale, softcap, stats, squares, compute):
    out = _outputs(hidden, Statistics(stats, squares), compute)
    return _flat(out, torch.empty_like(out.top))


@_backward_op.register_fake
def _(d_logp, d_lse, d_entropy, hidden, weight, *rest):
    *_, compute, want = rest
    wide = products.wide(compute)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    dtypes = (hidden.dtype, wide, wide)
    return tuple(
        hidden.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, want, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden, weight, target, bias, cast_weight, ignore_index, scale, softcap, *_, compute = inputs
    logp, _, top, total, entropy, *data = output
    # The weight as the products read it: the backward casts nothing again.
    ready = weight if cast_weight is None else cast_weight
    ctx.save_for_backward(hidden, ready, target, bias, logp, top, total, entropy)
    ctx.options = (ignore_index, scale, softcap, compute)
    ctx.mark_non_differentiable(top, total, *data)
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, d_logp: Tensor | None, d_lse: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    d_entropy = others[2]
    wants = ctx.needs_input_grad
    want = [wants[0], wants[1], wants[3]]
    saved = ctx.saved_tensors
    grads = _backward_op(d_logp, d_lse, d_entropy, *saved, *ctx.options, want)
    dX, dW, db = (g if w else None for g, w in zip(grads, want, strict=True))
    return dX, dW, None, db, *[None] * 7


_forward_op.register_autograd(_autograd, setup_context=_setup_context)


def linear_logprob(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (T,)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: bool = False,
    squares: bool = False,
    cast_weight: Tensor | None = None,  # (V, D)
) -> Logprob:
    """Log-prob of each row's target under a linear head, and the log-sum-exp, without the (T, V)
    logits.

    Equals `linear_logprob_ref`: z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap),
    lse = logsumexp(z), logp = z_target - lse, entropy = -sum p log p. Differentiable in hidden,
    weight and bias for any gradient of logp, lse and entropy; the backward makes the logits again
    (four products in all; `linear_preference_loss` needs three). A frozen side skips its product.

    Args:
        hidden, weight: bf16, fp32 or fp64, of one dtype; under `torch.autocast` the products are
            made in its dtype.
        target: vocabulary ids, or `ignore_index`: such a row has logp 0, no gradient through it,
            and is not correct. Any other id outside 0..V-1 gives NaN.
        stats: entropy, argmax hits and mean logits, from the same sweep (of ignored rows too).
        squares: log sum_v p_v^2, from the same sweep.
        cast_weight: `weight` in the dtype of the products, where the caller keeps a copy. Gradients
            still go to `weight`.

    Memory: logits of one chunk (1/32 of a GPU's memory at most, 32 MiB on a CPU, as fp32), under
    autocast the cast weight until the backward, and dW in fp32 during the backward.
    Precision: logits and sums in fp32 (fp64 for fp64), whatever the inputs. Deterministic: no
    atomics. torch.compile traces it without a graph break. Not twice differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, DTensors, fp16.
    """
    compute = checks.head(hidden, weight, target, bias)
    checks.head_options(logit_scale, softcap)
    checks.cast_weight(cast_weight, weight, compute)
    if cast_weight is None and weight.dtype != compute:
        cast_weight = weight.detach().to(compute)
    logp, lse, _, _, entropy, correct, logit_mean, log_sum_squares = _forward_op(
        hidden,
        weight,
        target,
        bias,
        None if cast_weight is None else cast_weight.detach(),
        ignore_index,
        float(logit_scale),
        softcap,
        stats,
        squares,
        compute,
    )
    return Logprob(
        logp=logp,
        lse=lse,
        entropy=entropy if stats else None,
        correct=correct if stats else None,
        logit_mean=logit_mean if stats else None,
        log_sum_squares=log_sum_squares if squares else None,
    )


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: bool = False,
    squares: bool = False,
) -> Logprob:
    """The specification, in plain torch with the whole logits, in the dtype of the arguments."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logprobs = z.log_softmax(-1)
    ignored = target == ignore_index
    logp = logprobs.gather(1, target.long().masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(
        ignored, 0.0
    )
    out = Logprob(logp, z.logsumexp(-1), None, None, None, None)
    if squares:
        out = out._replace(log_sum_squares=(2 * logprobs).logsumexp(-1))
    if not stats:
        return out
    entropy = -torch.xlogy(logprobs.exp(), logprobs.exp()).sum(-1)
    correct = (z.argmax(-1) == target) & ~ignored
    return out._replace(entropy=entropy, correct=correct, logit_mean=z.mean(-1))
