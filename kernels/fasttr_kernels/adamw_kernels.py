"""The Triton kernels of AdamW, over a table of pointers.

`clock_kernel` moves each parameter's clock and makes the scalars of its step on the device;
`adamw_kernel` reads weights, gradients and moments once and writes them once; `squares_kernel` is
the sweep for the norm. A unit is the run of elements that one program updates. Each operation is
rounded in the order of the torch path, so launches turn fusing off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fasttr_kernels import adamw_torch
from fasttr_kernels import bits_triton as bits

GROUP = tl.constexpr(adamw_torch.GROUP)
TINY = tl.constexpr(adamw_torch.TINY)
MOMENTS = tl.constexpr(adamw_torch.STREAM_OF_MOMENTS)
WEIGHTS = tl.constexpr(adamw_torch.STREAM_OF_WEIGHTS)
# Columns of the table.
PARAM = tl.constexpr(0)
REMAINDER = tl.constexpr(1)
GRAD = tl.constexpr(2)
MOMENT1 = tl.constexpr(3)
MOMENT2 = tl.constexpr(4)
SCALE1 = tl.constexpr(5)
SCALE2 = tl.constexpr(6)
REFERENCE = tl.constexpr(7)
REFERENCE_REMAINDER = tl.constexpr(8)
CLOCK = tl.constexpr(9)
NUMBER = tl.constexpr(10)
HYPER = tl.constexpr(11)  # the bits of five fp64 numbers
ELEMENTS = tl.constexpr(16)
FIRST_UNIT = tl.constexpr(17)
COLUMNS = tl.constexpr(18)
SCALARS = tl.constexpr(9)


@triton.jit
def clock_kernel(
    Table,  # (programs, COLUMNS)
    Clip,  # ()
    Scalars,  # (programs, SCALARS) fp32
):
    pid = tl.program_id(0)
    row = Table + pid * COLUMNS
    out = Scalars + pid * SCALARS
    clip = tl.load(Clip).to(tl.float64)
    if clip >= 0:
        lr = tl.load(row + HYPER).to(tl.float64, bitcast=True)
        beta1 = tl.load(row + HYPER + 1).to(tl.float64, bitcast=True)
        beta2 = tl.load(row + HYPER + 2).to(tl.float64, bitcast=True)
        eps = tl.load(row + HYPER + 3).to(tl.float64, bitcast=True)
        weight_decay = tl.load(row + HYPER + 4).to(tl.float64, bitcast=True)
        clock = tl.load(row + CLOCK).to(tl.pointer_type(tl.float64))
        power1 = tl.load(clock + 1) * beta1
        power2 = tl.load(clock + 2) * beta2
        tl.store(clock, tl.load(clock) + 1)
        tl.store(clock + 1, power1)
        tl.store(clock + 2, power2)
        tl.store(out, clip.to(tl.float32))
        tl.store(out + 1, (1 - lr * weight_decay).to(tl.float32))
        tl.store(out + 2, beta1.to(tl.float32))
        tl.store(out + 3, (1 - beta1).to(tl.float32))
        tl.store(out + 4, beta2.to(tl.float32))
        tl.store(out + 5, (1 - beta2).to(tl.float32))
        # In fp64 quotients and roots are rounded correctly as they are.
        tl.store(out + 6, (lr / (1 - power1)).to(tl.float32))
        tl.store(out + 7, (1.0 / tl.sqrt(1 - power2)).to(tl.float32))
        tl.store(out + 8, eps.to(tl.float32))
    else:
        tl.store(out, -1.0)


@triton.jit
def _words(random, stream, start, BLOCK: tl.constexpr):
    """32 random bits for each element; a call of Philox serves 4 neighbours, which lie in one
    thread."""
    seed, step, number = random
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.int32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + number, zero + stream, zero + step)
    return tl.join(tl.join(a, b), tl.join(c, d)).reshape((BLOCK,)).to(tl.uint32, bitcast=True)


@triton.jit
def _at(Row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer out of the table."""
    pointer = tl.load(Row + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _decoded(code, scale, INVERSE: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    root = code.to(tl.float32) * INVERSE
    square = root * root
    if SIGNED:
        power = square * (root * tl.abs(root))
    else:
        power = (square * square) * (square * square)
    return tl.reshape(tl.reshape(power, BLOCK // GROUP, GROUP) * scale[:, None], BLOCK)


@triton.jit
def _scaled(x, BLOCK: tl.constexpr):
    """The largest of each group, and the numbers over it."""
    groups = tl.reshape(x, BLOCK // GROUP, GROUP)
    largest = tl.max(groups, 1)
    one = tl.full((BLOCK // GROUP,), 1.0, tl.float32)
    inverse = tl.where(largest >= TINY, tl.div_rn(one, tl.maximum(largest, TINY)), 0.0)
    return largest, tl.reshape(groups * inverse[:, None], BLOCK)


@triton.jit
def _first_code(m, BLOCK: tl.constexpr):
    largest, y = _scaled(tl.abs(m), BLOCK)
    code = tl.floor(tl.sqrt_rn(tl.sqrt_rn(y)) * 127.0 + 0.5)
    return tl.where(m < 0, -code, code).to(tl.int8), largest


@triton.jit
def _second_code(v, BLOCK: tl.constexpr):
    largest, y = _scaled(v, BLOCK)
    code = tl.floor(tl.sqrt_rn(tl.sqrt_rn(tl.sqrt_rn(y))) * 255.0 + 0.5)
    return tl.where((v > 0) & (code < 1.0), 1.0, code).to(tl.uint8), largest


@triton.jit
def _block(
    start,
    mask,
    elements,
    pointers,
    random,  # seed, step, number of the parameter
    scalars,
    mixing,  # alpha, 1 - alpha
    SPLIT: tl.constexpr,
    NOISY_WEIGHTS: tl.constexpr,
    NOISY_MOMENTS: tl.constexpr,
    COMPANDED: tl.constexpr,
    FOLLOWED: tl.constexpr,
    REFERENCE_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE_127: tl.constexpr,
    INVERSE_255: tl.constexpr,
):
    param, remainder, grad, moment1, moment2, scale1, scale2, reference, rest_of_it = pointers
    clip, decay, beta1, rest1, beta2, rest2, step_size, inverse, eps = scalars
    alpha, rest = mixing
    offs = start + tl.arange(0, BLOCK)
    groups = start // GROUP + tl.arange(0, BLOCK // GROUP)
    group_mask = groups * GROUP < elements

    g = tl.load(grad + offs, mask=mask).to(tl.float32) * clip
    if SPLIT:
        high_bits = tl.load(param + offs, mask=mask)
        p = bits.join_halves(high_bits, tl.load(remainder + offs, mask=mask))
    else:
        p = tl.load(param + offs, mask=mask).to(tl.float32)
    m = tl.load(moment1 + offs, mask=mask)
    v = tl.load(moment2 + offs, mask=mask)
    if COMPANDED:
        old1 = tl.load(scale1 + groups, mask=group_mask)
        old2 = tl.load(scale2 + groups, mask=group_mask)
        m = _decoded(m, old1, INVERSE_127, True, BLOCK)
        v = _decoded(v, old2, INVERSE_255, False, BLOCK)

    p = p * decay
    m = m.to(tl.float32) * beta1 + g * rest1
    v = v.to(tl.float32) * beta2 + g * rest2 * g
    if COMPANDED:
        if mask is not None:
            m = tl.where(mask, m, 0.0)
            v = tl.where(mask, v, 0.0)
        code, largest = _first_code(m, BLOCK)
        tl.store(moment1 + offs, code, mask=mask)
        tl.store(scale1 + groups, largest, mask=group_mask)
        code, largest = _second_code(v, BLOCK)
        tl.store(moment2 + offs, code, mask=mask)
        tl.store(scale2 + groups, largest, mask=group_mask)
    elif NOISY_MOMENTS:
        words = _words(random, MOMENTS, start, BLOCK)
        low, high = (words & 0xFFFF).to(tl.int32), (words >> 16).to(tl.int32)
        bits.store_bf16(moment1, offs, bits.stochastic_bits(m, low), mask)
        bits.store_bf16(moment2, offs, bits.stochastic_bits(v, high), mask)
    else:
        tl.store(moment1 + offs, m, mask=mask)
        tl.store(moment2 + offs, v, mask=mask)

    p = p - tl.div_rn(m * step_size, tl.sqrt_rn(v) * inverse + eps)
    if SPLIT:
        high_bits, low_bits = bits.split_halves(p)
        tl.store(param + offs, high_bits, mask=mask)
        tl.store(remainder + offs, low_bits, mask=mask)
    elif NOISY_WEIGHTS:
        words = _words(random, WEIGHTS, start, BLOCK)
        low = (words & 0xFFFF).to(tl.int32)
        bits.store_bf16(param, offs, bits.stochastic_bits(p, low), mask)
    else:
        tl.store(param + offs, p, mask=mask)

    if FOLLOWED:
        r = tl.load(reference + offs, mask=mask)
        if REFERENCE_SPLIT:
            r = bits.join_halves(r, tl.load(rest_of_it + offs, mask=mask))
        r = bits.mix(r, p, alpha, rest)
        if REFERENCE_SPLIT:
            high_bits, low_bits = bits.split_halves(r)
            tl.store(reference + offs, high_bits, mask=mask)
            tl.store(rest_of_it + offs, low_bits, mask=mask)
        else:
            tl.store(reference + offs, r, mask=mask)


@triton.jit
def _row_of(Table, unit, n_rows, n_steps, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """The number of the row whose run of units holds `unit`."""
    first = 0
    last = n_rows
    for _ in range(n_steps):
        middle = (first + last) // 2
        right = tl.load(Table + middle * WIDTH + COLUMN) <= unit
        first = tl.where(right, middle, first)
        last = tl.where(right, last, middle)
    return first


@triton.jit(do_not_specialize=["alpha_bits", "seed", "n_rows", "n_steps"])
def adamw_kernel(
    Table,  # (n_rows, COLUMNS)
    Scalars,  # (n_rows, SCALARS) fp32
    alpha_bits,  # of fp64
    seed,
    n_rows,
    n_steps,  # of the search for a unit's row
    P: tl.constexpr,  # of the pointers to weights, gradients and both moments
    G: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    SPLIT: tl.constexpr,
    NOISY_WEIGHTS: tl.constexpr,
    NOISY_MOMENTS: tl.constexpr,
    COMPANDED: tl.constexpr,
    FOLLOWED: tl.constexpr,
    REFERENCE_SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE_127: tl.constexpr,
    INVERSE_255: tl.constexpr,
):
    unit = tl.program_id(0)
    found = _row_of(Table, unit, n_rows, n_steps, FIRST_UNIT, COLUMNS)
    row = Table + found * COLUMNS
    scalar = Scalars + found * SCALARS
    clip = tl.load(scalar)
    if clip < 0:
        return
    elements = tl.load(row + ELEMENTS)
    base = (unit - tl.load(row + FIRST_UNIT)) * UNIT
    pointers = (
        _at(row, PARAM, P, ALIGNED),
        _at(row, REMAINDER, tl.int16, ALIGNED),
        _at(row, GRAD, G, ALIGNED),
        _at(row, MOMENT1, M1, ALIGNED),
        _at(row, MOMENT2, M2, ALIGNED),
        _at(row, SCALE1, tl.float32, ALIGNED),
        _at(row, SCALE2, tl.float32, ALIGNED),
        _at(row, REFERENCE, tl.int16 if REFERENCE_SPLIT else tl.float32, ALIGNED),
        _at(row, REFERENCE_REMAINDER, tl.int16, ALIGNED),
    )
    clock = _at(row, CLOCK, tl.float64, False)
    random = (seed, tl.load(clock).to(tl.int32), tl.load(row + NUMBER).to(tl.int32))
    s = (
        clip,
        tl.load(scalar + 1),
        tl.load(scalar + 2),
        tl.load(scalar + 3),
        tl.load(scalar + 4),
        tl.load(scalar + 5),
        tl.load(scalar + 6),
        tl.load(scalar + 7),
        tl.load(scalar + 8),
    )
    alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
    mixing = (alpha.to(tl.float32), (1.0 - alpha).to(tl.float32))
    for part in range(0, UNIT, BLOCK):
        start = base + part
        if start < elements:
            # Whole blocks go unmasked: a mask of unknown length would narrow every access to one
            # element.
            if start + BLOCK <= elements:
                _block(
                    start,
                    None,
                    elements,
                    pointers,
                    random,
                    s,
                    mixing,
                    SPLIT,
                    NOISY_WEIGHTS,
                    NOISY_MOMENTS,
                    COMPANDED,
                    FOLLOWED,
                    REFERENCE_SPLIT,
                    BLOCK,
                    INVERSE_127,
                    INVERSE_255,
                )
            else:
                _block(
                    start,
                    start + tl.arange(0, BLOCK) < elements,
                    elements,
                    pointers,
                    random,
                    s,
                    mixing,
                    SPLIT,
                    NOISY_WEIGHTS,
                    NOISY_MOMENTS,
                    COMPANDED,
                    FOLLOWED,
                    REFERENCE_SPLIT,
                    BLOCK,
                    INVERSE_127,
                    INVERSE_255,
                )


@triton.jit
def squares_kernel(
    Table,  # (n_rows, 3): gradient, elements, first unit
    Sums,  # (units,) fp64
    n_rows,
    n_steps,
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares of each unit: squares in fp32, sums in fp64, in one order."""
    unit = tl.program_id(0)
    row = Table + _row_of(Table, unit, n_rows, n_steps, 2, 3) * 3
    grad = _at(row, 0, G, ALIGNED)
    elements = tl.load(row + 1)
    base = (unit - tl.load(row + 2)) * UNIT
    sums = tl.zeros((BLOCK,), tl.float64)
    for part in range(0, UNIT, BLOCK):
        offs = base + part + tl.arange(0, BLOCK)
        if base + part + BLOCK <= elements:
            g = tl.load(grad + offs).to(tl.float32)
            sums += (g * g).to(tl.float64)
        elif base + part < elements:
            g = tl.load(grad + offs, mask=offs < elements, other=0.0).to(tl.float32)
            sums += (g * g).to(tl.float64)
    tl.store(Sums + unit, tl.sum(sums, 0))
