"""What the compiler made of a kernel, with no GPU: registers, stack, widths of memory accesses, and
the instructions of its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# Of a chip: most shared memory of a block and of a multiprocessor, bytes.
SHARED = {80: 166912, 90: 232448, 100: 232448}
SHARED_SM = {80: 167936, 90: 233472, 100: 233472}
REGISTERS_SM = 65536
WARPS_SM = 64
BLOCKS_SM = 32
# Of an element.
BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}


class Case(NamedTuple):
    """One specialisation of a kernel. `arguments` maps each name to a type, or to its value where
    it is a constant."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    num_warps: int
    elements: int  # of the main loop, one turn of all threads
    stores: bool  # whether its main traffic has a store
    moved: str  # bytes moved against the least possible
    fp_fusion: bool = True
    maxnreg: int | None = None


class Built(NamedTuple):
    registers: int
    stack: int  # bytes; a spill takes some
    shared: int
    load: int  # widest global load, bytes
    store: int
    blocks: int  # of one multiprocessor, by registers, shared memory and warps
    instructions: float | None  # of the main loop, an element; None unless disassembled


def joined(*words: str) -> str:
    """The name of a case."""
    return " ".join(word for word in words if word)


def build(case: Case, arch: int, disassemble: bool = True) -> Built:
    """Compile a case for a chip and read what came out; the disassembler takes most of the time."""
    compiled = _compile(case, arch)
    instructions = None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        if disassemble:
            turn = main_loop(_output("nvdisasm", "-c", file.name))
            instructions = turn / (case.elements / (32 * case.num_warps))
    registers, stack = (int(re.findall(rf"{x}:(\d+)", usage)[-1]) for x in ("REG", "STACK"))
    shared = compiled.metadata.shared
    return Built(
        registers=registers,
        stack=stack,
        shared=shared,
        load=widest_access("ld", compiled.asm["ptx"]),
        store=widest_access("st", compiled.asm["ptx"]),
        blocks=blocks_of_a_multiprocessor(registers, shared, case.num_warps, arch),
        instructions=instructions,
    )


def _compile(case: Case, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = case.kernel
    while not hasattr(fn, "arg_names") or hasattr(fn, "configs") or hasattr(fn, "values"):
        fn = fn.fn
    is_type = {name: isinstance(case.arguments[name], str) for name in fn.arg_names}
    source = ASTSource(
        fn,
        signature={n: case.arguments[n] if is_type[n] else "constexpr" for n in fn.arg_names},
        constexprs={n: case.arguments[n] for n in fn.arg_names if not is_type[n]},
        attrs={(fn.arg_names.index(n),): [["tt.divisibility", 16]] for n in case.divisible},
    )
    options: dict[str, Any] = {
        "num_warps": case.num_warps,
        "enable_fp_fusion": case.fp_fusion,
        "maxnreg": case.maxnreg,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _output(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    done = subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def widest_access(way: str, ptx: str) -> int:
    """Bytes of a thread's widest access to global memory: vectors of PTX stay whole."""
    found = re.findall(rf"\b{way}\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\b", ptx)
    return max((int(vector or 1) * int(bits) // 8 for vector, bits in found), default=0)


def main_loop(code: str) -> int:
    """Instructions of one turn of the main loop: the shortest loop with a load of 16 bytes, or the
    whole kernel where there is none. What a branch may jump over counts if it holds such a load:
    the rest is for ends of rows and other rare cases."""
    instructions, labels = _parse(code)
    wide = [i for i, text in enumerate(instructions) if re.search(r"LDG\S*\.(128|256)", text)]
    jumps = _jumps(instructions, labels)
    loops = [(to, at) for at, to in jumps if to <= at and any(to <= i <= at for i in wide)]
    last = max((i for i, text in enumerate(instructions) if "EXIT" in text), default=0)
    start, stop = min(loops, key=lambda loop: loop[1] - loop[0], default=(0, last))
    rare: set[int] = set()
    for at, to in jumps:
        over = range(at + 1, min(to, stop + 1))
        if at >= start and not any(i in over for i in wide):
            rare.update(over)
    return sum(i not in rare for i in range(start, stop + 1))


def _parse(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a listing, and the place of each label among them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ?;", line):
            instructions.append(found[1])
    return instructions, labels


def _jumps(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(place, target) of the branches."""
    found = []
    for place, text in enumerate(instructions):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
        if branch and branch[1] in labels:
            found.append((place, labels[branch[1]]))
    return found


def blocks_of_a_multiprocessor(registers: int, shared: int, num_warps: int, arch: int) -> int:
    """Registers are given out by 256 to a warp; a block takes 1 KiB of shared memory for itself."""
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS_SM // of_a_warp // num_warps
    by_shared = SHARED_SM[arch] // (shared + 1024)
    return min(by_registers, by_shared, WARPS_SM // num_warps, BLOCKS_SM)


def faults(case: Case, built: Built, arch: int) -> list[str]:
    """What is wrong with a compiled kernel; empty where nothing is."""
    wrong = []
    if built.stack:
        wrong.append(f"spills ({built.stack} bytes of stack)")
    if built.shared > SHARED[arch]:
        wrong.append(f"shared memory {built.shared} over {SHARED[arch]}")
    if built.load < 16:
        wrong.append(f"widest load {built.load} bytes")
    if case.stores and built.store < 16:
        wrong.append(f"widest store {built.store} bytes")
    return wrong
