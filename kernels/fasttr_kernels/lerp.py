"""The reference update: reference <- reference + alpha (policy - reference), over many tensors at
once.

bf16 keeps 8 bits of a weight, so increments under 2^-9 of it vanish and a slow average never moves.
Two remedies stand
beside plain rounding: stochastic rounding, right on average, and split storage, where the bf16
tensor that the model uses is the high half of an fp32 number and an int16 tensor keeps the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr_kernels import checks, lerp_torch
from fasttr_kernels.lerp_torch import Item

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class _Pair(NamedTuple):
    """A reference of any shape, its policy, and its remainder where it is split."""

    reference: Tensor
    policy: Tensor
    remainder: Tensor | None


def multi_tensor_lerp_(
    references: Iterable[Tensor],
    policies: Iterable[Tensor],  # shape for shape as references
    alpha: float,
    *,
    rounding: str = "nearest",
    seed: int | None = None,
    remainders: Iterable[Tensor | None] | None = None,  # int16, shape for shape
) -> None:
    """Move reference tensors toward policy tensors in place: reference <- reference + alpha (policy
    - reference).

    Computed in fp32 (fp64 where either is fp64) and rounded once to the dtype of the reference; the
    two may differ in dtype. Alpha 0 leaves the references bitwise, alpha 1 copies bitwise between
    equal dtypes. One launch for each pair of dtypes on a GPU, in one read and one write; no
    autograd, no version counters. TR-DPO's soft update (arXiv:2404.09656, equation 5).

    Args:
        references, policies: bf16, fp32 or fp64, parameters too. A reference on another device than
            its policy is updated there, tensor by tensor. DTensors are updated shard by shard and
            need equal placements.
        alpha: share of the policy, in [0, 1].
        rounding: `nearest`, or `stochastic` for bf16 references: up or down with the odds that keep
            the mean exact.
        seed: of stochastic rounding; equal seeds repeat bit for bit on one device. None draws from
            torch's generator. Replicas that must stay equal need an equal seed.
        remainders: the low halves of split references, None for a tensor without. A bf16 reference
            and its remainder are one fp32 number, high 16 bits rounded so that the low 16 are a
            signed rest; start from zeros. The average is then the fp32 average bit for bit, at 4
            bytes a parameter.

    Raises:
        ValueError: lengths, shapes, dtypes, fp16, alpha outside [0, 1], a remainder without a bf16
            reference.
    """
    pairs = _pairs(references, policies, remainders)
    split = any(pair.remainder is not None for pair in pairs)
    _check_options(alpha, rounding, seed, split)
    for number, pair in enumerate(pairs):
        _check_pair(number, pair)
    stochastic = rounding == "stochastic"
    seed = -1 if seed is None else seed
    with torch.no_grad():
        if torch.compiler.is_compiling():
            _update_op(*_lists(pairs), float(alpha), stochastic, seed)
        else:
            _update(pairs, float(alpha), stochastic, seed)


def _pairs(
    references: Iterable[Tensor],
    policies: Iterable[Tensor],
    remainders: Iterable[Tensor | None] | None,
) -> list[_Pair]:
    refs = list(references)
    pols = list(policies)
    lows = [None] * len(refs) if remainders is None else list(remainders)
    for name, others in (("policies", pols), ("remainders", lows)):
        if len(others) != len(refs):
            raise checks.fail(
                name,
                f"{len(others)} tensors",
                f"{len(refs)}, one for each reference",
                "match them",
            )
    return [_Pair(*three) for three in zip(refs, pols, lows, strict=True)]


def _lists(pairs: list[_Pair]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The pairs as the registered op takes them: an empty remainder stands for none."""
    rests = [
        x.reference.new_empty(0, dtype=torch.int16) if x.remainder is None else x.remainder
        for x in pairs
    ]
    return [x.reference for x in pairs], [x.policy for x in pairs], rests


def _update(pairs: list[_Pair], alpha: float, stochastic: bool, seed: int) -> None:
    if alpha == 0:
        return
    if stochastic and seed < 0:
        seed = int(torch.randint(2**62, ()))
    fused: list[_Pair] = []
    on_gpu: list[Item] = []
    elsewhere: list[Item] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        local = _local(pair)
        if not stochastic and lerp_torch.rounds_as_torch(*local, alpha):
            fused.append(local)
        elif local.reference.numel():
            kernel = local.reference.is_cuda and local.policy.device == local.reference.device
            (on_gpu if kernel else elsewhere).append(_item(local, copies))
    if fused:
        torch._foreach_lerp_([x.reference for x in fused], [x.policy for x in fused], alpha)
    if on_gpu:
        from fasttr_kernels.lerp_triton import launch

        launch(on_gpu, alpha, stochastic, seed)
    lerp_torch.update(elsewhere, alpha, stochastic, seed)
    for target, value in copies:
        target.copy_(value.view(target.shape))


def _local(pair: _Pair) -> _Pair:
    """The tensors on this rank, apart from autograd and its version counters."""
    remainder = None if pair.remainder is None else _shard(pair.remainder).data
    return _Pair(_shard(pair.reference).data, _shard(pair.policy).data, remainder)


def _shard(x: Tensor) -> Tensor:
    return x.to_local() if checks.is_sharded(x) else x  # type: ignore[attr-defined]


def _item(pair: _Pair, copies: list[tuple[Tensor, Tensor]]) -> Item:
    """A pair as runs of memory. What is no such run is copied, and noted to be copied back."""
    tensors = [x for x in pair if x is not None]
    flat = _flat(tensors)
    if flat is None:
        flat = [x.contiguous().view(-1) for x in tensors]
        for target, value in zip(tensors[::2], flat[::2], strict=True):
            if target.data_ptr() != value.data_ptr():
                copies.append((target, value))
    return Item(flat[0], flat[1], flat[2] if len(flat) == 3 else None)


def _flat(tensors: list[Tensor]) -> list[Tensor] | None:
    """The tensors as runs of memory, where they lie in memory in one and the same order without
    gaps."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(-1) for x in tensors]
    stride = tensors[0].stride()
    order = sorted(range(len(stride)), key=lambda i: -stride[i])
    turned = [x.permute(order) for x in tensors]
    return [x.view(-1) for x in turned] if all(x.is_contiguous() for x in turned) else None


def _update_lists(
    references: list[Tensor],
    policies: list[Tensor],
    remainders: list[Tensor],
    alpha: float,
    stochastic: bool,
    seed: int,
) -> None:
    three = zip(references, policies, remainders, strict=True)
    pairs = [_Pair(r, p, m if m.shape == r.shape and m.numel() else None) for r, p, m in three]
    _update(pairs, alpha, stochastic, seed)


# A custom op, so that torch.compile takes the update whole.
_update_op = torch.library.custom_op(
    "fasttr::multi_tensor_lerp_",
    _update_lists,
    mutates_args=("references", "remainders"),
    schema="(Tensor(a!)[] references, Tensor[] policies, Tensor(b!)[] remainders, float alpha, "
    "bool stochastic, int seed) -> ()",
)


@_update_op.register_fake
def _(references, policies, remainders, alpha, stochastic, seed):
    return None


def _check_options(alpha: float, rounding: str, seed: int | None, split: bool) -> None:
    if isinstance(alpha, Tensor) or not (math.isfinite(alpha) and 0 <= alpha <= 1):
        raise checks.fail(
            "alpha", alpha, "a host number in [0, 1]", "it is the share of the policy"
        )
    if rounding not in ("nearest", "stochastic"):
        raise checks.fail(
            "rounding", repr(rounding), "'nearest' or 'stochastic'", "'nearest' is the default"
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise checks.fail("seed", seed, "0..2**63 - 1, or None", "None draws one")
    if rounding == "stochastic" and split:
        raise checks.fail(
            "rounding",
            "'stochastic' with remainders",
            "one of the two",
            "split storage is exact as it is",
        )


def _check_pair(number: int, pair: _Pair) -> None:
    reference, policy, remainder = pair
    for name, x in (("references", reference), ("policies", policy)):
        if x.dtype not in DTYPES:
            raise checks.fail(
                f"{name}[{number}]", x.dtype, "bfloat16, float32 or float64", "convert it"
            )
    _check_alike(f"policies[{number}]", policy, reference)
    if remainder is None:
        return
    _check_alike(f"remainders[{number}]", remainder, reference)
    if reference.dtype != torch.bfloat16:
        raise checks.fail(
            f"remainders[{number}]",
            f"a {reference.dtype} reference",
            "a bfloat16 one",
            "pass None for it",
        )
    if remainder.dtype != torch.int16 or remainder.device != reference.device:
        raise checks.fail(
            f"remainders[{number}]",
            f"{remainder.dtype} on {remainder.device}",
            f"int16 on {reference.device}",
            "start from torch.zeros_like",
        )


def _check_alike(name: str, x: Tensor, reference: Tensor) -> None:
    if x.shape != reference.shape:
        raise checks.fail(
            name, tuple(x.shape), f"{tuple(reference.shape)}", "match the tensors in order"
        )
    # Shards of other pieces can have equal shapes.
    got, wanted = checks.placement(x), checks.placement(reference)
    if got != wanted:
        raise checks.fail(
            name,
            f"placements {got}",
            f"those of its reference, {wanted}",
            "shard both alike, or redistribute one",
        )


def lerp_ref(reference: Tensor, policy: Tensor, alpha: float) -> Tensor:
    """The specification: the average in fp64, rounded once to the dtype of the reference."""
    exact = reference.double() + alpha * (policy.double() - reference.double())
    return (reference if alpha == 0 else policy if alpha == 1 else exact).to(reference.dtype)
