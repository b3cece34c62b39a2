"""What the compiler is asked for of the kernels over whole tensors: the lerp, AdamW, and the gather
of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fasttr_kernels.sass import BYTES, Case, joined

WEIGHT_BYTES = {"bf16": 2, "split": 4, "fp32": 4}
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "int8": 2.0625}


def cases() -> Iterator[Case]:
    yield from lerp_cases()
    yield from adamw_cases()
    yield from gather_cases()


def lerp_cases() -> Iterator[Case]:
    for reference, policy, way in (
        ("bf16", "bf16", ""),
        ("bf16", "fp32", ""),
        ("fp32", "fp32", ""),
        ("bf16", "bf16", "split"),
        ("bf16", "fp32", "split"),
        ("bf16", "fp64", "split"),
        ("bf16", "bf16", "stochastic"),
        ("bf16", "fp32", "stochastic"),
    ):
        yield _lerp_case(reference, policy, way)


def _lerp_case(reference: str, policy: str, way: str) -> Case:
    import triton.language as tl

    from fasttr_kernels import lerp_triton

    dtypes = {"bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}
    arguments = {
        "Table": "*i64",
        "alpha_bits": "i64",
        "seed": "i64",
        "n_tensors": "i32",
        "n_steps": "i32",
        "REF": dtypes[reference],
        "POL": dtypes[policy],
        "SPLIT": way == "split",
        "STOCHASTIC": way == "stochastic",
        "ALIGNED": True,
        "UNIT": lerp_triton.UNIT,
        "BLOCK": lerp_triton.BLOCK,
    }
    moved = 2 * BYTES[reference] + BYTES[policy] + (4 if way == "split" else 0)
    return Case(
        name=joined("lerp", f"{reference} <- {policy}", way),
        kernel=lerp_triton.lerp_kernel,
        arguments=arguments,
        divisible=("Table",),
        num_warps=lerp_triton.WARPS,
        elements=lerp_triton.BLOCK,
        stores=True,
        moved=f"{moved} B an element, least {moved}",
        fp_fusion=False,
    )


def adamw_cases() -> Iterator[Case]:
    for weights, moments, grad, reference in (
        ("split", "fp32", "bf16", ""),
        ("split", "fp32", "fp32", ""),
        ("split", "bf16", "bf16", ""),
        ("split", "bf16", "fp32", ""),
        ("split", "int8", "bf16", ""),
        ("split", "int8", "fp32", ""),
        ("fp32", "fp32", "fp32", ""),
        ("fp32", "bf16", "fp32", ""),
        ("bf16", "bf16", "bf16", ""),
        ("bf16", "int8", "bf16", ""),
        ("split", "fp32", "fp32", "split"),
        ("split", "bf16", "fp32", "split"),
        ("split", "int8", "fp32", "split"),
        ("fp32", "fp32", "fp32", "fp32"),
    ):
        yield _adamw_case(weights, moments, grad, reference)
    yield _squares_case("bf16")
    yield _squares_case("fp32")


def _adamw_case(weights: str, moments: str, grad: str, reference: str) -> Case:
    from fasttr_kernels import adamw_kernels, adamw_triton

    kind = adamw_triton.kind(_adamw_item(weights, moments, grad, reference), alpha=0.5)
    arguments = {
        "Table": "*i64",
        "Scalars": "*fp32",
        "alpha_bits": "i64",
        "seed": "i64",
        "n_rows": "i32",
        "n_steps": "i32",
        **kind,
        **adamw_triton.CONSTANTS,
    }
    moved = 2 * (WEIGHT_BYTES[weights] + MOMENT_BYTES[moments]) + BYTES[grad]
    moved += 2 * WEIGHT_BYTES[reference] if reference else 0
    return Case(
        name=joined(
            f"adamw {weights}, {moments} moments, {grad} grad",
            f"+ {reference} reference" if reference else "",
        ),
        kernel=adamw_kernels.adamw_kernel,
        arguments=arguments,
        divisible=("Table", "Scalars"),
        num_warps=adamw_triton.WARPS,
        elements=kind["BLOCK"],
        stores=True,
        moved=f"{moved} B an element, least {moved}",
        fp_fusion=False,
        maxnreg=adamw_triton.most_registers(kind),
    )


def _adamw_item(weights: str, moments: str, grad: str, reference: str) -> Any:
    """Parameters of that storage, on no device."""
    import torch

    from fasttr_kernels.adamw_torch import MOMENTS, Hyper, Item, Moments

    new = lambda dtype: torch.empty(256, dtype=dtype, device="meta")  # noqa: E731
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "split": torch.bfloat16}
    first, second = MOMENTS[moments]
    scale = new(torch.float32) if moments == "int8" else None
    return Item(
        number=0,
        param=new(dtypes[weights]),
        remainder=new(torch.int16) if weights == "split" else None,
        grad=new(dtypes[grad]),
        moments=Moments(new(first), new(second), scale, scale),
        clock=new(torch.float64),
        hyper=Hyper(1e-6, 0.9, 0.999, 1e-8, 0.0),
        reference=new(dtypes[reference]) if reference else None,
        reference_remainder=new(torch.int16) if reference == "split" else None,
    )


def _squares_case(grad: str) -> Case:
    import triton.language as tl

    from fasttr_kernels import adamw_kernels, adamw_triton

    return Case(
        name=f"squares {grad}",
        kernel=adamw_kernels.squares_kernel,
        arguments={
            "Table": "*i64",
            "Sums": "*fp64",
            "n_rows": "i32",
            "n_steps": "i32",
            "G": {"bf16": tl.bfloat16, "fp32": tl.float32}[grad],
            "ALIGNED": True,
            "UNIT": adamw_triton.UNIT,
            "BLOCK": adamw_triton.SQUARES_BLOCK,
        },
        divisible=("Table", "Sums"),
        num_warps=adamw_triton.WARPS,
        elements=adamw_triton.SQUARES_BLOCK,
        stores=False,
        moved=f"{BYTES[grad]} B an element, least {BYTES[grad]}",
    )


def gather_cases() -> Iterator[Case]:
    """Keys and values of 8 heads of 128, as Llama-3-8B has them; 16 heads of 80 for odd widths."""
    for heads, width in ((8, 128), (16, 80)):
        yield _gather_case("gather_kernel", heads, width)
        yield _gather_case("sum_kernel", heads, width)


def _gather_case(kernel: str, heads: int, width: int) -> Case:
    import triton.language as tl

    from fasttr_kernels import gather_triton

    launch = gather_triton.launch_options(heads * width)
    constants = {"HEAD_K": width, "HEAD_V": width, "WIDE": tl.float32, **launch}
    integers = ("width", "stride")
    wanted: dict[str, Any] = {}
    for name in getattr(gather_triton, kernel).arg_names:
        if name in constants:
            wanted[name] = constants[name]
        elif name.startswith(integers):
            wanted[name] = "i32"
        else:
            wanted[name] = "*i32" if name in gather_triton.INDICES else "*bf16"
    return Case(
        name=f"{kernel.removesuffix('_kernel')} of keys and values, {heads} heads of {width}",
        kernel=getattr(gather_triton, kernel),
        arguments=wanted,
        divisible=tuple(n for n, kind in wanted.items() if isinstance(kind, str)),
        num_warps=launch["num_warps"],
        elements=launch["BLOCK"],
        stores=True,
        moved="4 B an element, least 4; a shared row is read once more for each reader",
    )
