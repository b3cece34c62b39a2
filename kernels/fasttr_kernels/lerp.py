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
from typing import Any

import torch
from torch import Tensor

from fasttr_kernels import checks, lerp_torch
from fasttr_kernels.lerp_torch import Item

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def _flat(tensors: list[Tensor]) -> list[Tensor] | None:
    """The tensors as runs of memory, where they lie in memory in one and the same order without
    gaps."""
    stride = tensors[0].stride()
    order = sorted(range(len(stride)), key=lambda i: -stride[i])
    turned = [x.permute(order) for x in tensors]
    return [x.view(-1) for x in turned] if all(x.is_contiguous() for x in turned) else None


def _update(
    references: list[Tensor],
    policies: list[Tensor],
    remainders: list[Tensor],
    alpha: float,
    stochastic: bool,
    seed: int,
) -> None:
    """The op on plain tensors; an empty remainder stands for none."""
    if alpha == 0:
        return
    if stochastic and seed < 0:
        seed = int(torch.randint(2**62, ()))
    on_gpu: list[Item] = []
    elsewhere: list[Item] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for reference, policy, remainder in zip(references, policies, remainders, strict=True):
        tensors = [x.data for x in (reference, policy, remainder) if x.numel()]
        if not tensors:
            continue
        flat = _flat(tensors)
        if flat is None:
            flat = [x.contiguous().view(-1) for x in tensors]
            copies += [
                (x, y)
                for x, y in zip(tensors[::2], flat[::2], strict=True)
                if x.data_ptr() != y.data_ptr()
            ]
        item = Item(flat[0], flat[1], flat[2] if len(flat) == 3 else None)
        (on_gpu if reference.is_cuda and policy.device == reference.device else elsewhere).append(
            item
        )
    if on_gpu:
        from fasttr_kernels.lerp_triton import launch

        launch(on_gpu, alpha, stochastic, seed)
    lerp_torch.update(elsewhere, alpha, stochastic, seed)
    for target, value in copies:
        target.copy_(value.view(target.shape))


# A custom op, so that torch.compile takes the update whole.
_update_op = torch.library.custom_op(
    "fasttr::multi_tensor_lerp_",
    _update,
    mutates_args=("references", "remainders"),
    schema="(Tensor(a!)[] references, Tensor[] policies, Tensor(b!)[] remainders, float alpha, "
    "bool stochastic, int seed) -> ()",
)


@_update_op.register_fake
def _(references, policies, remainders, alpha, stochastic, seed):
    return None


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
    refs, pols = [_local(x) for x in references], [_local(x) for x in policies]
    lows: list[Tensor | None] = (
        [None] * len(refs)
        if remainders is None
        else [None if x is None else _local(x) for x in remainders]
    )
    _check(refs, pols, lows, alpha, rounding, seed)
    rests = [
        r.new_empty(0, dtype=torch.int16) if x is None else x
        for r, x in zip(refs, lows, strict=True)
    ]
    update: Any = _update_op if torch.compiler.is_compiling() else _update
    with torch.no_grad():
        update(
            refs, pols, rests, float(alpha), rounding == "stochastic", -1 if seed is None else seed
        )


def _local(x: Tensor) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _check(
    references: list[Tensor],
    policies: list[Tensor],
    remainders: list[Tensor | None],
    alpha: float,
    rounding: str,
    seed: int | None,
) -> None:
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
    if rounding == "stochastic" and any(x is not None for x in remainders):
        raise checks.fail(
            "rounding",
            "'stochastic' with remainders",
            "one of the two",
            "split storage is exact as it is",
        )
    for name, others in (("policies", policies), ("remainders", remainders)):
        if len(others) != len(references):
            raise checks.fail(
                name,
                f"{len(others)} tensors",
                f"{len(references)}, one for each reference",
                "match them",
            )
    for i, (reference, policy, remainder) in enumerate(
        zip(references, policies, remainders, strict=True)
    ):
        for name, x in (("references", reference), ("policies", policy)):
            if x.dtype not in DTYPES:
                raise checks.fail(
                    f"{name}[{i}]", x.dtype, "bfloat16, float32 or float64", "convert it"
                )
        for name, y in (("policies", policy), ("remainders", remainder)):
            if y is not None and y.shape != reference.shape:
                raise checks.fail(
                    f"{name}[{i}]",
                    tuple(y.shape),
                    f"{tuple(reference.shape)}",
                    "match the tensors in order",
                )
        if remainder is None:
            continue
        if reference.dtype != torch.bfloat16:
            raise checks.fail(
                f"remainders[{i}]",
                f"a {reference.dtype} reference",
                "a bfloat16 one",
                "pass None for it",
            )
        if remainder.dtype != torch.int16 or remainder.device != reference.device:
            raise checks.fail(
                f"remainders[{i}]",
                f"{remainder.dtype} on {remainder.device}",
                f"int16 on {reference.device}",
                "start from torch.zeros_like",
            )


def lerp_ref(reference: Tensor, policy: Tensor, alpha: float) -> Tensor:
    """The specification: the average in fp64, rounded once to the dtype of the reference."""
    exact = reference.double() + alpha * (policy.double() - reference.double())
    return (reference if alpha == 0 else policy if alpha == 1 else exact).to(reference.dtype)
