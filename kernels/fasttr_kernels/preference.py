"""Preference losses in three passes: the weights of a group are known while its logits are still there.

Legend: T scored rows, N completions, G groups, V vocabulary, D hidden size, C rows of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttr_kernels import checks, products
from fasttr_kernels import rows as torch_rows
from fasttr_kernels.rows import Head

LossFn = Callable[[Tensor, Tensor | None, slice], Tensor]


class PreferenceLoss(NamedTuple):
    """What `linear_preference_loss` returns; all but `loss` are detached. Nats."""

    loss: Tensor  # ()
    logp: Tensor  # (N,) summed log-prob of each completion
    token_logp: Tensor  # (T,)
    entropy: Tensor | None  # (T,)
    correct: Tensor | None  # (T,) bool: the target is the argmax
    logit_mean: Tensor | None  # (T,) mean over the vocabulary of the scaled, soft-capped logits


class Chunk(NamedTuple):
    """A run of whole groups. `pieces` are its row ranges: more than one where a single group exceeds `chunk_rows`."""

    groups: slice
    completions: slice
    rows: slice
    pieces: tuple[slice, ...]


class Call(NamedTuple):
    """One call, after its checks."""

    hidden: Tensor
    head: Head
    target: Tensor
    cu_completions: list[int]
    cu_groups: list[int]
    loss_fn: LossFn | None
    ref_logp: Tensor | None
    normalizer: float
    chunk_rows: int
    stats: bool
    rows: Any


def plan(cu_completions: list[int], cu_groups: list[int], chunk_rows: int) -> Iterator[Chunk]:
    """Cut the groups, in order, into the largest runs of whole groups with at most `chunk_rows` rows."""
    row_of = [cu_completions[n] for n in cu_groups]
    groups, first = len(row_of) - 1, 0
    while first < groups:
        last = first + 1
        while last < groups and row_of[last + 1] - row_of[first] <= chunk_rows:
            last += 1
        start, stop = row_of[first], row_of[last]
        pieces = tuple(slice(r, min(r + chunk_rows, stop)) for r in range(start, stop, chunk_rows))
        yield Chunk(slice(first, last), slice(cu_groups[first], cu_groups[last]), slice(start, stop), pieces)
        first = last


def default_chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows whose fp32 logits take about 2 GiB on a GPU, 32 MiB on a CPU."""
    if device.type == "cpu":
        return max(64, (1 << 23) // vocab // 64 * 64)
    return min(8192, max(1024, (1 << 29) // vocab // 128 * 128))


def _weigh(call: Call, chunk: Chunk, logp_n: Tensor, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """loss_fn of a chunk and its gradient by sequence log-prob, on vectors of a few numbers."""
    assert call.loss_fn is not None
    ref_n = None if call.ref_logp is None else call.ref_logp[chunk.completions]
    # Hooks of a checkpoint around the op would otherwise pack, and so run, this little graph once more.
    neutral = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.set_grad_enabled(want_grad), neutral, torch.autocast(logp_n.device.type, enabled=False):
        leaf_n = logp_n.detach().requires_grad_(want_grad)
        value = call.loss_fn(leaf_n, ref_n, chunk.groups)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise checks.fail("loss_fn", got, "a floating-point scalar ()", "return the sum of the groups' losses")
        if not want_grad:
            return value.detach(), None
        if _reaches_other_leaf(value, leaf_n):
            raise checks.fail("loss_fn", "a loss that depends on other tensors that require grad",
                              "a function of logp and ref_logp alone",
                              "detach them: they would get no gradient")  # fmt: skip
        if value.grad_fn is None:
            return value.detach(), torch.zeros_like(logp_n)
        (weight_n,) = torch.autograd.grad(value, leaf_n, allow_unused=True)
    return value.detach(), torch.zeros_like(logp_n) if weight_n is None else weight_n.to(logp_n.dtype)


def _reaches_other_leaf(value: Tensor, leaf: Tensor) -> bool:
    seen: set[Any] = set()
    front = [value.grad_fn]
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", leaf) is not leaf:
            return True
        front.extend(n for n, _ in node.next_functions)
    return False


def _segment_sum(value_T: Tensor, cu: list[int]) -> Tensor:
    """Sums of runs of rows, added up in fp64 and rounded once; a fixed order on every device."""
    offsets = torch.tensor(cu, device=value_T.device)
    return torch.segment_reduce(value_T.double(), "sum", offsets=offsets, initial=0.0).to(value_T.dtype)


class Grads(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def run(call: Call, want: tuple[bool, bool, bool], out_dtypes: tuple[torch.dtype, ...]) -> tuple[PreferenceLoss, Grads]:
    """The chunk driver: scores, losses, and for what `want` names (hidden, weight, bias) the gradients."""
    hidden_TD, head, rows = call.hidden, call.head, call.rows
    (T, D), V = hidden_TD.shape, head.weight.shape[0]
    dtype, device = products.wide(hidden_TD.dtype), hidden_TD.device
    new = functools.partial(torch.zeros, dtype=dtype, device=device)
    want_grad = any(want)
    chunks = list(plan(call.cu_completions, call.cu_groups, call.chunk_rows))
    most = max((p.stop - p.start for chunk in chunks for p in chunk.pieces), default=0)
    work = rows.Workspace(most, head, call.stats, want_grad)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    logp_N, token_T = new(len(call.cu_completions) - 1), new(T)
    entropy_T, mean_T = (new(T), new(T)) if call.stats else (None, None)
    correct_T = torch.zeros(T, dtype=torch.bool, device=device) if call.stats else None
    d_hidden = torch.zeros(T, D, dtype=out_dtypes[0], device=device) if want[0] else None
    d_weight = torch.empty(V, D, dtype=dtype, device=device) if want[1] else None
    d_bias = new(V) if want[2] else None
    started = False

    def score(piece: slice) -> torch_rows.RowScores:
        scores = rows.score(hidden_TD[piece], head, call.target[piece], work, call.stats)
        token_T[piece] = scores.logp
        if entropy_T is not None and correct_T is not None and mean_T is not None:
            entropy_T[piece], correct_T[piece], mean_T[piece] = scores.entropy, scores.correct, scores.mean
        return scores

    for chunk in chunks:
        for piece in chunk.pieces:
            scores = score(piece)
        completions = chunk.completions
        cu = [r - chunk.rows.start for r in call.cu_completions[completions.start : completions.stop + 1]]
        if completions.stop > completions.start:
            logp_N[completions] = _segment_sum(token_T[chunk.rows], cu)
        if call.loss_fn is None:
            continue
        value, weight_n = _weigh(call, chunk, logp_N[completions], want_grad)
        loss += value / call.normalizer
        if weight_n is None or not chunk.pieces:
            continue
        lengths = torch.tensor(cu, device=device).diff()
        weight_C = torch.repeat_interleave(weight_n / call.normalizer, lengths, output_size=cu[-1])
        for piece in chunk.pieces:
            if len(chunk.pieces) > 1:
                scores = score(piece)
            weight_c = weight_C[piece.start - chunk.rows.start : piece.stop - chunk.rows.start]
            dz, factor = rows.logit_grad(scores, head, call.target[piece], weight_c, weight_c, work)
            accumulate(dz, factor, hidden_TD[piece], head.weight, None if d_hidden is None else d_hidden[piece],
                       d_weight, d_bias, started)  # fmt: skip
            started = True
    if d_weight is not None and not started:
        d_weight.zero_()
    out = PreferenceLoss(loss.to(dtype), logp_N, token_T, entropy_T, correct_T, mean_T)
    return out, Grads(d_hidden, d_weight, d_bias)


def accumulate(
    dz_CV: Tensor, factor_C: Tensor | None, hidden_CD: Tensor, weight_VD: Tensor,
    d_hidden_CD: Tensor | None, d_weight_VD: Tensor | None, d_bias_V: Tensor | None, started: bool,
) -> None:  # fmt: skip
    """The products of the backward for one chunk; the factor of a row goes to the D-sized side."""
    if d_hidden_CD is not None:
        products.hidden_grad(dz_CV, weight_VD, d_hidden_CD)
        if factor_C is not None:
            d_hidden_CD.mul_(factor_C[:, None])
    if d_weight_VD is not None:
        rows_CD = hidden_CD if factor_C is None else hidden_CD.to(factor_C.dtype) * factor_C[:, None]
        products.weight_grad(dz_CV, rows_CD, d_weight_VD, started)
    if d_bias_V is not None:
        d_bias_V += dz_CV.sum(0, dtype=d_bias_V.dtype) if factor_C is None else factor_C @ dz_CV


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor | None, ...]:
        want = tuple(ctx.needs_input_grad[:3])
        out, grads = run(call, want, (hidden.dtype,))
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # On a CPU the comparison is free and saves a sweep over dW; on a GPU it would wait for the device.
        unit = d_loss.device.type == "cpu" and bool(d_loss == 1)
        return *(_scaled(g, d_loss, t, unit) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)), None


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
) -> PreferenceLoss:
    """Sum of `loss_fn` over groups of completions, divided by `normalizer`, differentiable in hidden, weight, bias."""
    compute = checks.head(hidden, weight, target, bias)
    checks.head_options(logit_scale, softcap)
    completions = checks.offsets("cu_completions", cu_completions, hidden.shape[0], "every row of hidden")
    groups = checks.offsets("cu_groups", cu_groups, len(completions) - 1, "every completion")
    N = len(completions) - 1
    if ref_logp is not None and (ref_logp.shape != (N,) or ref_logp.device != hidden.device):
        raise checks.fail("ref_logp", f"shape {tuple(ref_logp.shape)} on {ref_logp.device}",
                          f"({N},) on {hidden.device}", "one summed log-prob for each completion")  # fmt: skip
    if isinstance(normalizer, bool | Tensor) or not (math.isfinite(normalizer) and normalizer > 0):
        raise checks.fail("normalizer", normalizer, "a host number above 0", "pass the step's count of groups")
    if chunk_rows is not None and chunk_rows < 1:
        raise checks.fail("chunk_rows", chunk_rows, "at least 1, or None", "None takes the measured default")
    if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.parameters()):
        raise checks.fail("loss_fn", "a module with parameters", "a function without parameters",
                          "its parameters would get no gradient: compute that term outside")  # fmt: skip
    if hidden.device.type == "cpu" and target.numel():
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise checks.fail("target", f"ids {low}..{high}", f"0..{weight.shape[0] - 1}",
                              "pass scored rows alone, without ignored positions")  # fmt: skip
    with torch.no_grad():
        head = Head(weight.detach().to(compute), None if bias is None else bias.detach().to(products.wide(compute)),
                    float(logit_scale), softcap)  # fmt: skip
        rows_TD = hidden.detach().to(compute)
    call = Call(rows_TD, head, target.long(), completions, groups, loss_fn,
                None if ref_logp is None else ref_logp.detach().to(products.wide(compute)), float(normalizer),
                chunk_rows or default_chunk_rows(weight.shape[0], hidden.device), stats, torch_rows)  # fmt: skip
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    with torch.autocast(hidden.device.type, enabled=False):
        if loss_fn is None or not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            return run(call, (False, False, False), (hidden.dtype,))[0]
        return PreferenceLoss(*_Preference.apply(hidden, weight, bias, call))
