"""The kernels compile for GPUs that are not here, and what is read from the machine code is
right."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest
import torch
from fasttr_kernels import logits_triton, rows_triton, sass
from fasttr_kernels.head import Head, RowLogps, Statistics
from fasttr_kernels.sass import Built, Case

from tests.kernels.accuracy import DEVICE, bare

FINE = Built(registers=40, stack=0, shared=0, load=16, store=16, blocks=8, instructions=None)


def test_every_kernel_compiles_for_every_chip_without_spills_and_with_wide_accesses() -> None:
    done = bare("-m", "fasttr_kernels.aot", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if " sm_" in line]
    names = {line.split("sm_")[0].strip() for line in table}
    assert {
        "row_logps",
        "row_logps stats",
        "row_logps stats squares bias+scale+softcap",
        "logit_grad bf16",
        "logit_grad fp32",
        "lerp bf16 <- fp32 split",
        "adamw split, fp32 moments, fp32 grad + split reference",
        "adamw split, bf16 moments, bf16 grad",
        "adamw split, int8 moments, fp32 grad",
        "squares bf16",
    } <= names
    for chip in ("sm_80", "sm_90", "sm_100"):
        assert {line.split("sm_")[0].strip() for line in table if f" {chip} " in line} == names


COUNTED = """
from fasttr_kernels import aot_head, sass
for case in aot_head.logp_cases():
    if case.name in ("row_logps stats", "row_logps stats bias+scale+softcap"):
        print(sass.build(case, 90).instructions)
"""


def test_statistics_cost_few_instructions() -> None:
    """With a maximum of the whole row in every turn the same sweep took 31 an element, and 69 with
    a soft cap."""
    done = bare("-c", COUNTED)
    plain, capped = map(float, done.stdout.split())
    assert plain < 31 / 2
    assert capped < 69 * 0.55


def test_the_check_finds_every_fault() -> None:
    case = Case("any", None, {}, (), num_warps=8, elements=2048, stores=True, moved="")
    assert sass.faults(case, FINE, 80) == []
    for bad in ({"stack": 8}, {"shared": 166913}, {"load": 8}, {"store": 8}):
        assert len(sass.faults(case, FINE._replace(**bad), 80)) == 1


LISTING = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/              @P0 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0050*/                   FADD R4, R4, R5 ;
.L_x_1:
        /*0060*/              @P1 BRA `(.L_x_2) ;
        /*0070*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0080*/                   FADD R8, R8, R5 ;
.L_x_2:
        /*0090*/              @P2 BRA `(.L_x_0) ;
        /*00a0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_is_counted_without_what_is_jumped_over() -> None:
    # Two, the branch, the branch, two with a wide load, the way back.
    assert sass.main_loop(LISTING) == 3 + 1 + 2 + 1
    straight = LISTING.replace("@P2 BRA `(.L_x_0)", "NOP")
    assert sass.main_loop(straight) == 1 + 3 + 1 + 2 + 1 + 2, "no loop: up to the exit"


def test_the_widest_access_is_read_from_ptx() -> None:
    ptx = """
    ld.global.b64 { %rd1 }, [ %rd2 + 0 ];
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];
    @%p1 st.global.v2.b32 [ %rd2 + 0 ], { %r1, %r2 };
    st.shared.v4.b32 [ %r2 + 0 ], { %r1, %r2, %r3, %r4 };
    """
    assert sass.widest_access("ld", ptx) == 16
    assert sass.widest_access("st", ptx) == 8


def test_blocks_of_a_multiprocessor_by_each_of_its_limits() -> None:
    blocks = sass.blocks_of_a_multiprocessor
    assert blocks(80, 0, 8, 90) == 65536 // (80 * 256) == 3
    assert blocks(32, 0, 8, 90) == 8, "64 warps"
    assert blocks(32, 64 * 1024, 8, 90) == 233472 // (65 * 1024) == 3
    assert blocks(16, 0, 1, 90) == 32


def test_a_search_for_configurations_finds_one_for_calls_with_and_without_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton's search is keyed by V and by the dtype of every argument: other statistics, other
    order of sums."""
    keys = []

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **_: keys.append(
                [str(x.dtype) if hasattr(x, "dtype") else type(x) for x in args]
            )

    monkeypatch.setattr(logits_triton, "logp_kernel", Launch())
    head = Head(torch.zeros(40, 4, device=DEVICE), None, 1.0, None)
    target = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for statistics in (Statistics(), Statistics(True), Statistics(False, True)):
        out = RowLogps.empty(DEVICE, 3, torch.float32, statistics)
        rows_triton.logps_of_products(torch.zeros(3, 64, device=DEVICE)[:, :40], head, target, out)
    assert len(keys) == 3
    assert keys[0] == keys[1] == keys[2]


ALIGNMENT = """
from fasttr_kernels import lerp_triton, logits_triton
for kernel in (logits_triton.logp_kernel, logits_triton.logit_grad_kernel):
    fn = kernel
    while not hasattr(fn, "params"):
        fn = fn.fn
    left_out = lambda p: p.is_constexpr or p.do_not_specialize_on_alignment
    print(" ".join(p.name for p in fn.params if not left_out(p)))
params = lerp_triton.lerp_kernel.params
print(" ".join(p.name for p in params if not (p.is_constexpr or p.do_not_specialize)))
"""


def test_rows_that_start_anywhere_and_another_alpha_need_no_compilation_of_their_own() -> None:
    done = bare("-c", ALIGNMENT)
    assert done.stdout.splitlines() == [
        "Z Bias V stride_z",
        "Z Bias DZ V stride_z stride_dz",
        "Table",
    ], done.stderr


def test_every_launch_compiles_as_its_own_code_makes_it() -> None:
    """On CPU tensors, for a chip that is not here: see the script."""
    done = bare(str(Path(__file__).with_name("compiled_launches.py")))
    assert done.returncode == 0, done.stdout + done.stderr
    found = collections.Counter(line.split()[0] for line in done.stdout.splitlines())
    assert set(found) == {
        *("logp_kernel", "logit_grad_kernel", "scale_kernel"),
        *("clock_kernel", "adamw_kernel", "squares_kernel"),
        *("lerp_kernel", "gather_kernel", "sum_kernel"),
    }


CLOCK = """
from fasttr_kernels import adamw_kernels, sass
for clip in ("*fp32", "*fp64"):
    arguments = {"Table": "*i64", "Clip": clip, "Scalars": "*fp32"}
    case = sass.Case("clock", adamw_kernels.clock_kernel, arguments, ("Table",), 1, 1, False, "")
    for arch in sorted(sass.SHARED):
        print(sass.build(case, arch, disassemble=False).stack)
"""


def test_the_clock_of_adamw_compiles_for_every_chip() -> None:
    """It moves a few numbers a parameter, so that no access of it is wide."""
    done = bare("-c", CLOCK)
    assert done.stdout.split() == ["0"] * 2 * len(sass.SHARED), done.stderr
