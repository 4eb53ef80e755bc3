"""Products by panels of int8: what panels.py does in bf16, with the CPU's dot products of four bytes, twice as many.

    weights   codes 0..255 of PANEL_ROWS rows x 256 columns, [64][PANEL_ROWS][4], with f32 scales (and minima) of each
              `sub` columns, [256 / sub][PANEL_ROWS]: the file's values exactly
    rows      q8_256 records (quants): 256 int8 with one scale, and sums of 16

    out = sum over blocks of 256 of  scale_x · sum over subs of ( scale_w · sum(code · x) - minimum · sum(x) )

A format without minima has a centre instead: sum((code - centre) · x), so the integer sums start at -centre · sum(x).
What is lost is the rounding of x to int8, 0.6 % rms of an output on normal data; llama.cpp rounds x in the same way.
"""

from __future__ import annotations

from typing import Any

from . import quants
from .isa import ISA
from .panels import BLOCK_ROWS, COLUMNS, N_VEC, PANEL_ROWS, bytes_ahead
from .quants.activations import BLOCK_256, SCALE, SUMS


def panel_product(type_id: int) -> Any:
    """As panels.panel_product, for rows packed as records."""
    from .microkernel import rank1_wu8, zeros_f, zeros_i
    from .simd import device, prefetch

    ahead_step = device(bytes_ahead)
    f = quants.FORMATS[type_id]
    sub, centre = f.codes.sub, f.codes.centre
    signed = f.codes.largest > 127 and not ISA.u8s8
    n_centre = 0 if signed else centre or 0
    fill, panel_at, scales_at = filling(_unpack(type_id, signed), f)
    start, fold, finish = _start(sub // 16), fold_rows(sub // 16 if centre is None else 0), finish_rows()
    STEP = PANEL_ROWS * 4
    N = N_VEC
    M = BLOCK_ROWS // 2  # integers take as many registers as the f32 sums

    @device
    def product(w, w_row, n_w, k, x, block, n, sums, memory, ahead):
        step = ahead_step(n_w * w_row, k, n, M)
        for c in range(0, k, COLUMNS):
            width = min(COLUMNS, k - c)
            fill(w, w_row, n_w, c, width, memory)
            for t in range(0, n, M):
                for i in range(0, step, 64):
                    prefetch(ahead + i)
                ahead += step
                p, q, s = memory + panel_at, x + t * BLOCK_256, memory + scales_at
                q_sums = q + SUMS
                total = zeros_f(M, N)
                for _ in range(width // sub):
                    acc = start(zeros_i(M, N), q_sums, BLOCK_256, n_centre)
                    for _ in range(sub // 4):
                        acc = rank1_wu8(acc, p, q, BLOCK_256)
                        p += STEP
                        q += 4
                    total = fold(total, acc, s, q_sums, BLOCK_256)
                    s += STEP
                    q_sums += sub // 8
                finish(total, x + t * BLOCK_256 + SCALE, BLOCK_256, sums + t * STEP, c)
            x += block

    return product


def filling(unpack: Any, f: quants.Format, size: int = 1, n_factors: int = 64) -> tuple[Any, int, int]:
    """A device function (w, w_row, n_w, c, width, memory), and where in memory its two panels are.

    Columns from c on of n_w weight rows become a panel of codes of `size` bytes, and one of their factors, n_factors
    bytes of a row: unpack (w, codes, factors) says what these are.
    """
    from .simd import device, transpose16

    unit = max(64, f.block)  # columns that unpack takes
    unit_nbytes = unit // f.block * f.nbytes
    unit_factors = 4 * unit // f.codes.sub
    ROW, STEP = COLUMNS * size, PANEL_ROWS * 4
    factors_at = 16 * ROW
    panel_at = factors_at + 16 * n_factors
    scales_at = panel_at + ROW * PANEL_ROWS

    @device
    def fill(w, w_row, n_w, c, width, memory):
        codes, factors = memory, memory + factors_at
        for g in range(0, n_w, 16):
            for r in range(min(16, n_w - g)):
                source = w + (g + r) * w_row + c // unit * unit_nbytes
                for i in range(width // unit):
                    unpack(source + i * unit_nbytes, codes + r * ROW + i * unit * size,
                           factors + r * n_factors + i * unit_factors)  # fmt: skip
            for i in range(0, width * size, 64):
                transpose16(codes + i, ROW, memory + panel_at + i // 4 * STEP + 4 * g, STEP)
            for i in range(0, n_factors, 64):
                transpose16(factors + i, n_factors, memory + scales_at + i // 4 * STEP + 4 * g, STEP)

    return fill, panel_at, scales_at


def _unpack(type_id: int, signed: bool) -> Any:
    """An intrinsic (w, codes, factors): a block of 256, or two of 32. signed: the codes less 128."""
    from numba import types

    from .quants.emit import halves
    from .simd import F32, I8, A, V, const_i, instruction, offset, splat, store

    codes_of, f = quants.block_codes(type_id), quants.FORMATS[type_id]

    def floats(b, v, d):
        return b.fmul(b.sitofp(v, V(F32, v.type.count)), splat(b, d, v.type.count))

    @instruction(types.void, A, A, A)
    def unpack(b, w, codes, factors):
        if f.block == 256:
            q, scales, minima, d, dmin = codes_of(b, w)
            scales = floats(b, scales, d)
            minima = floats(b, minima, dmin) if minima else None
        else:
            blocks = (w, offset(b, w, f.nbytes))
            q, scales, minima = [codes_of(b, blocks)], halves(b, *blocks), None
            if f.codes.centre is None:
                minima = b.fneg(halves(b, *[offset(b, block, 2) for block in blocks]))
        for i, v in enumerate(q):
            store(b, b.xor(v, const_i(-128, 64, I8)) if signed else v, offset(b, codes, 64 * i))
        store(b, scales, factors)
        if minima is not None:
            store(b, minima, offset(b, factors, 32))

    return unpack


def _sum_of_row(b, address, n_sums):
    """Of the int8 under one scale of a weight: n_sums int16, as i32."""
    from .simd import I16, I32, load, offset

    total = b.sext(load(b, address, I16), I32)
    for i in range(1, n_sums):
        total = b.add(total, b.sext(load(b, offset(b, address, 2 * i), I16), I32))
    return total


def _start(n_sums: int) -> Any:
    """(acc, sums, stride, centre): acc[m, :] = -centre · sum[m]"""
    from numba.extending import intrinsic

    from .simd import I32, A, splat

    @intrinsic
    def start(_context, acc, sums, stride, centre):
        def emit(context, b, sig, args):
            regs, address, stride, centre = args
            for m in range(acc.M):
                value = splat(b, b.mul(_sum_of_row(b, address, n_sums), b.neg(b.trunc(centre, I32))))
                for n in range(acc.N):
                    regs = b.insert_value(regs, value, m * acc.N + n)
                address = b.add(address, stride)
            return regs

        return acc(acc, A, A, A), emit

    return start


def fold_rows(n_sums: int) -> Any:
    """(total, acc, scales, sums, stride): total[m, n] += scale[n] · acc[m, n], and - minimum[n] · sum[m] if n_sums.

    Minima lie 8 rows behind the scales.
    """
    from numba.extending import intrinsic

    from .simd import F32, VF, A, fma_, load, offset, splat

    @intrinsic
    def fold(_context, total, acc, scales, sums, stride):
        def emit(context, b, sig, args):
            totals, regs, scales, sums, stride = args
            vector = lambda at, n: load(b, offset(b, scales, at + 64 * n), VF, 4)  # noqa: E731
            scale = [vector(0, n) for n in range(acc.N)]
            minimum = [vector(8 * PANEL_ROWS * 4, n) for n in range(acc.N)] if n_sums else []
            for m in range(acc.M):
                if n_sums:
                    low = splat(b, b.fneg(b.sitofp(_sum_of_row(b, sums, n_sums), F32)))
                    sums = b.add(sums, stride)
                for n in range(acc.N):
                    i = m * acc.N + n
                    v = fma_(b, b.sitofp(b.extract_value(regs, i), VF), scale[n], b.extract_value(totals, i))
                    totals = b.insert_value(totals, fma_(b, minimum[n], low, v) if n_sums else v, i)
            return totals

        return total(total, acc, A, A, A), emit

    return fold


def finish_rows() -> Any:
    """(total, scales, stride, to, c): f32 at to [m][n] (+)= total[m, n] · scale[m]; added unless c is 0."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    from .simd import F32, VF, A, const_f, fma_, load, offset, splat, store

    @intrinsic
    def finish(_context, total, scales, stride, to, c):
        def emit(context, b, sig, args):
            totals, scales, stride, to, c = args
            first = b.icmp_signed("==", c, ir.Constant(c.type, 0))
            for m in range(total.M):
                scale = splat(b, load(b, scales, F32))
                scales = b.add(scales, stride)
                for n in range(total.N):
                    i = m * total.N + n
                    at = offset(b, to, 64 * i)
                    old = b.select(first, const_f(0.0), load(b, at, VF, 4))
                    store(b, fma_(b, b.extract_value(totals, i), scale, old), at, 4)

        return types.void(total, A, A, A, types.int64), emit

    return finish
