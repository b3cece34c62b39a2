"""Compile every kernel ahead of time, no GPU needed, and read what came out: `python -m
fasttr_kernels.aot`.

Fails on a spill, on a main load or store narrower than 16 bytes, and on more shared memory than the
chip has. V and D are run-time numbers in these kernels: what the compiler sees of a shape is
whether 16 divides V and the pitch, so shapes that agree there share one compilation.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Kernels decorated under the interpreter cannot be compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Most shared memory of a block, bytes.
SHARED = {80: 166912, 90: 232448, 100: 232448}
SHAPES = {
    "Llama-3-8B": (128256, 4096),
    "Qwen3-8B": (151936, 4096),
    "Pythia-2.8B": (50304, 2560),
    "Qwen2.5-0.5B": (151936, 896),
    "odd V": (50257, 768),
}
HEADS: dict[str, dict[str, Any]] = {
    "": {"Bias": None, "HAS_BIAS": False, "SCALE": 1.0, "SOFTCAP": None},
    "bias+scale+softcap": {"Bias": "*fp32", "HAS_BIAS": True, "SCALE": 0.5, "SOFTCAP": 30.0},
}
SIZES = {"bf16": 2, "fp32": 4, "i16": 2}


class Case(NamedTuple):
    """One specialisation of a kernel. `arguments` maps each name to a type, or to its value where
    it is a constant."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    num_warps: int
    stores: bool  # whether its main traffic has a store
    moved: str  # bytes moved against the least possible


class Built(NamedTuple):
    registers: int
    stack: int
    spills: int
    shared: int
    load: int
    store: int


def rows_cases() -> Iterator[Case]:
    from fasttr_kernels import rows_triton as kernels

    logp, grad = kernels.LOGP_CONFIGS[0], kernels.GRAD_CONFIGS[0]
    for names, vocab in _by_specialisation():
        pitch = -(-vocab // kernels.PITCH) * kernels.PITCH
        for label, head in HEADS.items() if vocab % 16 == 0 else [("", HEADS[""])]:
            for stats in (False, True):
                some: dict[str, Any] = {"Entropy": "*fp32", "Correct": "*i1", "Mean": "*fp32"}
                arguments: dict[str, Any] = {
                    "Z": "*fp32",
                    "Target": "*i64",
                    "Logp": "*fp32",
                    "Top": "*fp32",
                    "Total": "*fp32",
                    "V": "i32",
                    "stride_z": "i32",
                    **(some if stats else dict.fromkeys(some)),
                    **head,
                    "STATS": stats,
                    **logp.kwargs,
                }
                yield Case(
                    _join("row_logps", "stats" if stats else "", label, names),
                    kernels._logp_kernel,
                    arguments,
                    _multiples(arguments, vocab),
                    logp.num_warps,
                    False,
                    _moved(4 * pitch, 4 * vocab),
                )
            for dtype in ("bf16", "fp32"):
                arguments = {
                    "Z": "*fp32",
                    "Target": "*i64",
                    "Top": "*fp32",
                    "Total": "*fp32",
                    "OnTarget": "*fp32",
                    "OnSoftmax": "*fp32",
                    "DZ": f"*{dtype}",
                    "V": "i32",
                    "stride_z": "i32",
                    "stride_dz": "i32",
                    **head,
                    **grad.kwargs,
                }
                element = 4 + SIZES[dtype]
                yield Case(
                    _join("logit_grad", dtype, label, names),
                    kernels._logit_grad_kernel,
                    arguments,
                    _multiples(arguments, vocab),
                    grad.num_warps,
                    True,
                    _moved(element * pitch, element * vocab),
                )


def lerp_cases() -> Iterator[Case]:
    import triton.language as tl

    from fasttr_kernels import lerp_triton as kernels

    dtypes = {"bf16": tl.bfloat16, "fp32": tl.float32}
    for ref, pol, way in (
        ("bf16", "bf16", ""),
        ("bf16", "fp32", ""),
        ("fp32", "fp32", ""),
        ("bf16", "bf16", "split"),
        ("bf16", "fp32", "split"),
        ("bf16", "bf16", "stochastic"),
        ("bf16", "fp32", "stochastic"),
    ):
        arguments = {
            "Table": "*i64",
            "n_tensors": "i32",
            "n_steps": "i32",
            "REF": dtypes[ref],
            "POL": dtypes[pol],
            "SPLIT": way == "split",
            "STOCHASTIC": way == "stochastic",
            "ALIGNED": True,
            "UNIT": kernels.UNIT,
            "BLOCK": kernels.BLOCK,
        }
        moved = 2 * SIZES[ref] + SIZES[pol] + (4 if way == "split" else 0)
        yield Case(
            _join("lerp", f"{ref} <- {pol}", way),
            kernels._lerp_kernel,
            arguments,
            ("Table",),
            kernels.WARPS,
            True,
            f"{moved} B an element, least {moved}",
        )


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)


def _moved(bytes_moved: int, least: int) -> str:
    return f"{bytes_moved} B a row, least {least}"


def _by_specialisation() -> Iterator[tuple[str, int]]:
    """One shape of each kind that the compiler tells apart."""
    yield "", SHAPES["Llama-3-8B"][0]
    assert all(vocab % 16 == 0 for name, (vocab, _) in SHAPES.items() if name != "odd V")
    yield "odd V", SHAPES["odd V"][0]


def _multiples(arguments: dict[str, Any], vocab: int) -> tuple[str, ...]:
    """What a launch finds divisible by 16: pointers and pitches always, V by the shape."""
    pointers = [
        name for name, kind in arguments.items() if isinstance(kind, str) and kind.startswith("*")
    ]
    pitches = [name for name in arguments if name.startswith("stride")]
    return (*pointers, *pitches, *(["V"] if vocab % 16 == 0 else []))


def build(case: Case, arch: int) -> Built:
    """Compile for a chip, and read registers, stack, spills and the widths of the memory
    accesses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = case.kernel
    while not hasattr(fn, "arg_names") or hasattr(fn, "configs") or hasattr(fn, "values"):
        fn = fn.fn
    is_type = {n: isinstance(case.arguments[n], str) for n in fn.arg_names}
    source = ASTSource(
        fn,
        signature={n: case.arguments[n] if is_type[n] else "constexpr" for n in fn.arg_names},
        constexprs={n: case.arguments[n] for n in fn.arg_names if not is_type[n]},
        attrs={(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in case.divisible},
    )
    built = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": case.num_warps}
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    return Built(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=built.metadata.shared,
        load=_widest(r"\bLDG(\.[\w.]+)?", code),
        store=_widest(r"\bSTG(\.[\w.]+)?", code),
    )


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run(
        [str(tool), *arguments], check=True, capture_output=True, text=True
    ).stdout


def _widest(pattern: str, code: str) -> int:
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found = [
        4 if not (kinds := set((m or "").split(".")) & set(sizes)) else sizes[kinds.pop()]
        for m in re.findall(pattern, code)
    ]
    return max(found, default=0)


def faults(case: Case, built: Built, arch: int) -> list[str]:
    """What is wrong with a compiled kernel; empty where nothing is."""
    wrong = []
    if built.stack or built.spills:
        wrong.append(f"spills ({built.stack} bytes of stack, {built.spills} accesses)")
    if built.shared > SHARED[arch]:
        wrong.append(f"shared memory {built.shared} over {SHARED[arch]}")
    if built.load < 16:
        wrong.append(f"widest load {built.load} bytes")
    if case.stores and built.store < 16:
        wrong.append(f"widest store {built.store} bytes")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fasttr_kernels.aot", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(SHARED), default=sorted(SHARED)
    )
    arches = parser.parse_args(argv).arch
    if INTERPRETED:
        parser.error(
            "got TRITON_INTERPRET=1; wanted it unset: the interpreter has nothing to compile"
        )
    shared = ", ".join(
        f"{name} {vocab} x {dim}" for name, (vocab, dim) in SHAPES.items() if name != "odd V"
    )
    print(f"One compilation for {shared}; 'odd V' is {SHAPES['odd V'][0]}.")
    heads = (
        f"{'chip':>6} {'regs':>5} {'stack':>5} {'spills':>6} {'shared':>6} {'load':>4} {'store':>5}"
    )
    print(f"{'kernel':38} {heads}  moved")
    bad = 0
    for case in (*rows_cases(), *lerp_cases()):
        for arch in arches:
            built = build(case, arch)
            wrong = faults(case, built, arch)
            bad += bool(wrong)
            numbers = (
                f"{built.registers:5} {built.stack:5} {built.spills:6} {built.shared:6} "
                f"{built.load:4} "
                f"{built.store:5}"
            )
            print(
                f"{case.name:38} sm_{arch:<3} {numbers}  "
                f"{case.moved}{'  FAIL: ' * bool(wrong)}{', '.join(wrong)}"
            )
    print(f"{bad} failures" if bad else "no spills, wide main accesses, shared memory fits: ok")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
