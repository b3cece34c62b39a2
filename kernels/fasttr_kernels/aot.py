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

from fasttr_kernels import aot_flat, aot_head, sass
from fasttr_kernels.sass import Case

# Kernels decorated under the interpreter cannot be compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def cases() -> Iterator[Case]:
    """Every configuration that can be launched, with the options that cost the most; the one that
    ships with all of them."""
    yield from aot_head.cases()
    yield from aot_flat.cases()


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
    assert all(vocab % 16 == 0 for name, (vocab, _) in aot_head.SHAPES.items() if name != "odd V")
    shared = ", ".join(f"{n} {v} x {d}" for n, (v, d) in aot_head.SHAPES.items() if n != "odd V")
    print(f"One compilation for {shared}; 'odd V' is {aot_head.SHAPES['odd V'][0]}.")
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
