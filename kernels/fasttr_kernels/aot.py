"""Compile every kernel ahead of time, no GPU needed, and read what came out: `python -m
fasttr_kernels.aot`.

Fails on a spill, on a main load or store narrower than 16 bytes, and on more shared memory than the
chip has. V and D are run-time numbers in these kernels: what the compiler sees of a shape is
whether 16 divides V and the pitch, so shapes that agree there share one compilation.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from fasttr_kernels import sass
from fasttr_kernels.sass import Case

# Kernels decorated under the interpreter cannot be compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = {
    "Llama-3-8B": (128256, 4096),
    "Qwen3-8B": (151936, 4096),
    "Pythia-2.8B": (50304, 2560),
    "Qwen2.5-0.5B": (151936, 896),
    "odd V": (50257, 768),
}
PLAIN: dict[str, Any] = {"Bias": None, "HAS_BIAS": False, "SCALE": 1.0, "SOFTCAP": None}
CAPPED: dict[str, Any] = {"Bias": "*fp32", "HAS_BIAS": True, "SCALE": 0.5, "SOFTCAP": 30.0}
BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
WEIGHT_BYTES = {"bf16": 2, "split": 4, "fp32": 4}
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "int8": 2.0625}


def cases() -> Iterator[Case]:
    """Every configuration that can be launched, with the options that cost the most; the one that
    ships with all of them."""
    yield from logp_cases()
    yield from logit_grad_cases()
    yield from scale_cases()
    yield from lerp_cases()
    yield from adamw_cases()


def logp_cases() -> Iterator[Case]:
    from fasttr_kernels.logits_triton import LOGP_CONFIGS

    ships, *others = LOGP_CONFIGS
    for stats, squares in ((False, False), (True, False), (True, True)):
        yield _logp_case(ships, "Llama-3-8B", PLAIN, stats, squares)
        yield _logp_case(ships, "Llama-3-8B", CAPPED, stats, squares)
    yield _logp_case(ships, "odd V", PLAIN, False, False)
    yield _logp_case(ships, "odd V", PLAIN, True, True)
    for config in others:
        yield _logp_case(config, "Llama-3-8B", PLAIN, True, True)
        yield _logp_case(config, "Llama-3-8B", CAPPED, True, True)


def _logp_case(config: Any, shape: str, head: dict[str, Any], stats: bool, squares: bool) -> Case:
    from fasttr_kernels import logits_triton

    vocab, pitch = _vocab_and_pitch(shape)
    vectors = dict.fromkeys(("Logp", "Top", "Total", "Entropy", "Mean", "LogSumSquares"), "*fp32")
    arguments = {
        "Z": "*fp32",
        "Target": "*i64",
        "Correct": "*i1",
        **vectors,
        "V": "i32",
        "stride_z": "i32",
        **head,
        "STATS": stats,
        "SQUARES": squares,
        **config.kwargs,
    }
    return Case(
        name=_join(
            "row_logps",
            "stats" if stats else "",
            "squares" if squares else "",
            *_variant(config, logits_triton.LOGP_CONFIGS[0], shape, head),
        ),
        kernel=logits_triton.logp_kernel,
        arguments=arguments,
        divisible=_multiples(arguments, vocab),
        num_warps=config.num_warps,
        elements=config.kwargs["BLOCK_V"],
        stores=False,
        moved=_moved(4 * pitch, 4 * vocab),
        fp_fusion=False,
    )


def logit_grad_cases() -> Iterator[Case]:
    from fasttr_kernels.logits_triton import GRAD_CONFIGS

    ships, *others = GRAD_CONFIGS
    yield _logit_grad_case(ships, "Llama-3-8B", PLAIN, "bf16", entropy=True)
    for dtype in ("bf16", "fp32"):
        yield _logit_grad_case(ships, "Llama-3-8B", PLAIN, dtype)
        yield _logit_grad_case(ships, "Llama-3-8B", CAPPED, dtype)
        yield _logit_grad_case(ships, "odd V", PLAIN, dtype)
    for config in others:
        yield _logit_grad_case(config, "Llama-3-8B", CAPPED, "bf16")
        yield _logit_grad_case(config, "Llama-3-8B", CAPPED, "fp32")


def _logit_grad_case(
    config: Any, shape: str, head: dict[str, Any], dtype: str, entropy: bool = False
) -> Case:
    from fasttr_kernels import logits_triton

    vocab, pitch = _vocab_and_pitch(shape)
    arguments = {
        "Z": "*fp32",
        "Target": "*i64",
        **dict.fromkeys(("Top", "Total", "OnTarget", "OnSoftmax"), "*fp32"),
        "OnEntropy": "*fp32" if entropy else None,
        "DZ": f"*{dtype}",
        "V": "i32",
        "stride_z": "i32",
        "stride_dz": "i32",
        **head,
        "HAS_ENTROPY": entropy,
        **config.kwargs,
    }
    element = 4 + BYTES[dtype]
    return Case(
        name=_join(
            "logit_grad",
            dtype,
            "entropy" if entropy else "",
            *_variant(config, logits_triton.GRAD_CONFIGS[0], shape, head),
        ),
        kernel=logits_triton.logit_grad_kernel,
        arguments=arguments,
        divisible=_multiples(arguments, vocab),
        num_warps=config.num_warps,
        elements=config.kwargs["BLOCK_V"],
        stores=True,
        moved=_moved(element * pitch, element * vocab),
        fp_fusion=False,
    )


def scale_cases() -> Iterator[Case]:
    from fasttr_kernels import logits_triton, rows_triton

    yield Case(
        name="scale fp32",
        kernel=logits_triton.scale_kernel,
        arguments={"X": "*fp32", "By": "*fp32", "n": "i32", "BLOCK": rows_triton.SCALE_BLOCK},
        divisible=("X", "By", "n"),
        num_warps=rows_triton.SCALE_WARPS,
        elements=rows_triton.SCALE_BLOCK,
        stores=True,
        moved="8 B an element, least 8; none where the factor is 1",
    )


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
        name=_join("lerp", f"{reference} <- {policy}", way),
        kernel=lerp_triton._lerp_kernel,
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
        name=_join(
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


def _vocab_and_pitch(shape: str) -> tuple[int, int]:
    from fasttr_kernels.rows_triton import PITCH

    vocab = SHAPES[shape][0]
    return vocab, -(-vocab // PITCH) * PITCH


def _variant(config: Any, ships: Any, shape: str, head: dict[str, Any]) -> tuple[str, ...]:
    return (
        "bias+scale+softcap" if head is CAPPED else "",
        "odd V" if shape == "odd V" else "",
        "" if config is ships else f"{config.kwargs['BLOCK_V']} x {config.num_warps} warps",
    )


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _moved(bytes_moved: int, least: int) -> str:
    return f"{bytes_moved} B a row, least {least}"


def _multiples(arguments: dict[str, Any], vocab: int) -> tuple[str, ...]:
    """What a launch finds divisible by 16: matrices and pitches always, V by the shape; vectors
    over rows are not looked at."""
    from fasttr_kernels.logits_triton import VECTORS

    pointers = [n for n, kind in arguments.items() if isinstance(kind, str) and kind[0] == "*"]
    matrices = [name for name in pointers if name not in VECTORS]
    pitches = [name for name in arguments if name.startswith("stride")]
    return (*matrices, *pitches, *(["V"] if vocab % 16 == 0 else []))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fasttr_kernels.aot", description=__doc__)
    chips = sorted(sass.SHARED)
    parser.add_argument("--arch", type=int, nargs="+", choices=chips, default=chips)
    parser.add_argument("--quick", action="store_true", help="do not count instructions")
    args = parser.parse_args(argv)
    if INTERPRETED:
        parser.error(
            "got TRITON_INTERPRET=1; wanted it unset: the interpreter has nothing to compile"
        )
    assert all(vocab % 16 == 0 for name, (vocab, _) in SHAPES.items() if name != "odd V")
    shared = ", ".join(f"{n} {v} x {d}" for n, (v, d) in SHAPES.items() if n != "odd V")
    print(f"One compilation for {shared}; 'odd V' is {SHAPES['odd V'][0]}.")
    print("instr: instructions an element of the main loop; blocks: of one multiprocessor.")
    print(
        f"{'kernel':58} {'chip':>6} {'regs':>4} {'stack':>5} {'shared':>6} "
        f"{'load':>4} {'store':>5} {'instr':>5} {'blocks':>6}  moved"
    )
    bad = sum(_report(case, arch, args.quick) for case in cases() for arch in args.arch)
    print(f"{bad} failures" if bad else "no spills, wide main accesses, shared memory fits: ok")
    return 1 if bad else 0


def _report(case: Case, arch: int, quick: bool) -> bool:
    """Print the line of a case on a chip; whether something is wrong with it."""
    built = sass.build(case, arch, disassemble=not quick)
    wrong = sass.faults(case, built, arch)
    instructions = "-" if built.instructions is None else f"{built.instructions:.1f}"
    print(
        f"{case.name:58} sm_{arch:<3} {built.registers:4} {built.stack:5} {built.shared:6} "
        f"{built.load:4} {built.store:5} {instructions:>5} {built.blocks:6}  "
        f"{case.moved}{'  FAIL: ' * bool(wrong)}{', '.join(wrong)}"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
