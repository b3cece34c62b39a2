"""What the compiler is asked for of the kernels under the head: those of rows and of logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fasttr_kernels.sass import BYTES, Case, joined

SHAPES = {
    "Llama-3-8B": (128256, 4096),
    "Qwen3-8B": (151936, 4096),
    "Pythia-2.8B": (50304, 2560),
    "Qwen2.5-0.5B": (151936, 896),
    "odd V": (50257, 768),
}
PLAIN: dict[str, Any] = {"Bias": None, "HAS_BIAS": False, "SCALE": 1.0, "SOFTCAP": None}
CAPPED: dict[str, Any] = {"Bias": "*fp32", "HAS_BIAS": True, "SCALE": 0.5, "SOFTCAP": 30.0}


def cases() -> Iterator[Case]:
    yield from logp_cases()
    yield from logit_grad_cases()
    yield from scale_cases()


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
        name=joined(
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
        name=joined(
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
