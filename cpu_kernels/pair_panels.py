"""Products by panels of integers on x86 without dot products of four bytes: what int8_panels.py does, for plain AVX2.

AVX2 multiplies bytes to sums of two products in 16 bits (vpmaddubsw), and 16-bit values to sums of two in 32
(vpmaddwd). So there are two kinds of panels, [steps][PANEL_ROWS][32 bits]:

    int8    codes 0..127, 4 to a lane. Up to eight steps of 2 · 127 · code fit 16 bits; only their sum goes on to 32, by
            a vpmaddwd, which multiplies by the scale of a sub-block as well: a small integer in formats with blocks of
            256, whose only f32 arithmetic is that of d and dmin, once per 256
    int16   codes less 128, 2 to a lane; rows of x are rounded to 16 bits, 3e-5 rms of an output

    rows    q8_256 records (quants): 256 int8, sums of 16 and of 32, scale; or 256 int16 and a scale

    out = sum over blocks of 256 of  scale_x · ( d · sum over subs of scale · sum(code · x) - dmin · sum(min · sum(x)) )

A centre is a minimum too: scale · centre, in units of d. Formats with blocks of 32 have an f32 scale for each, and a
centre where the integer sums start.

Zen 4 as Haswell, one thread, 48 and 512 rows of x, 10⁹ products a second, what was before (f32 scales for each
sub-block; Q8_0 and IQ4_XS in f32) -> now: Q4_K 97, 110 -> 116, 128; Q5_K 90, 102 -> 110, 123; Q6_K 85, 94 -> 92, 104;
Q3_K 86, 91 -> 99, 112; Q5_0 89, 98 -> 93, 102; Q8_0 46, 51 -> 66, 69; IQ4_XS 47, 53 -> 65, 70. The peak is 187 of
int8: additions of pairs get into the two pipes that the products need. Tried: 3 or 4 rows of x at once (Q4_K 3 to 12 %
slower); minima from sums of 16 instead of 32 (Q4_K 108 instead of 125).
"""

from __future__ import annotations

from typing import Any

from . import quants
from .int8_panels import filling, finish_rows, fold_rows
from .panels import COLUMNS, N_VEC, PACKED_BYTES, PANEL_ROWS, bytes_ahead
from .quants.activations import SCALE, SCALE_OF_WORDS, SUMS, SUMS_32

M = 2  # rows of x in a register block: the integer sums of more are spilled
STEP = PANEL_ROWS * 4  # bytes of a step of a panel
FACTORS = 128  # bytes of a row's scales and minima: what they are is up to unpack
MINIMA_AT, D_AT = 16, 24  # rows of the panel of factors, of blocks of 256


def panel_product(type_id: int, kind: str) -> Any:
    """As panels.panel_product, for rows packed as int8 or int16 records."""
    from .microkernel import add_pairs, rank1_pairs, rank1_words, zeros_f, zeros_i
    from .simd import device, prefetch

    ahead_step = device(bytes_ahead)
    f = quants.FORMATS[type_id]
    sub, centre = f.codes.sub, f.codes.centre
    words, scaled = kind == "int16", kind == "int8" and f.block == 256
    unpack = _unpack_256(type_id) if scaled else _unpack(type_id, words)
    fill, panel_at, scales_at = filling(unpack, f, 2 if words else 1, FACTORS)
    minimum = centre is None
    fold, add_scaled, start, finish = fold_rows(0), _add_scaled(), _start(-1 if minimum else centre), finish_rows()
    RECORD = PACKED_BYTES[kind]
    N = N_VEC
    # steps that 16 bits hold; and between f32 sums so few that LLVM does not spill: with spills Q5_0 was 2.5 times
    # slower in 1 process of 5, presumably where the stack lay across the end of a page
    PAIRED = min(32767 // (2 * 127 * f.codes.largest), sub // 4 if scaled else 4)
    scale_x = SCALE_OF_WORDS if words else SCALE
    sums_at = SUMS if sub == 16 else SUMS_32

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
                p, q, s, to = memory + panel_at, x + t * RECORD, memory + scales_at, sums + t * STEP
                q_sums, q_minima, q_scale = q + SUMS, q + sums_at, q + scale_x
                if scaled:
                    acc = zeros_i(M, N)
                    for _ in range(COLUMNS // sub):
                        for _ in range(sub // 4 // PAIRED):
                            pairs = zeros_i(M, N)
                            for _ in range(PAIRED):
                                pairs = rank1_pairs(pairs, p, q, RECORD)
                                p += STEP
                                q += 4
                            acc = add_scaled(acc, pairs, s)
                        s += STEP
                    s = memory + scales_at
                    total = fold(zeros_f(M, N), acc, s + D_AT * STEP, 0, 0)
                    low = zeros_i(M, N)
                    for i in range(128 // sub):
                        low = rank1_words(low, s + (MINIMA_AT + i) * STEP, q_minima + 4 * i, RECORD)
                    total = fold(total, low, s + (D_AT + 1) * STEP, 0, 0)
                else:
                    total = zeros_f(M, N)
                    for _ in range(width // sub):
                        acc = zeros_i(M, N)
                        if minimum:
                            total = fold(total, start(zeros_i(M, N), q_sums, RECORD), s + 8 * STEP, 0, 0)
                        if words:
                            for _ in range(sub // 2):
                                acc = rank1_words(acc, p, q, RECORD)
                                p += STEP
                                q += 4
                        else:
                            for _ in range(min(k, sub // 4 // PAIRED)):  # a number LLVM does not know
                                pairs = zeros_i(M, N)
                                for _ in range(PAIRED):
                                    pairs = rank1_pairs(pairs, p, q, RECORD)
                                    p += STEP
                                    q += 4
                                acc = add_pairs(acc, pairs)
                        if not minimum and not words:
                            acc = start(acc, q_sums, RECORD)
                        total = fold(total, acc, s, 0, 0)
                        s += STEP
                        q_sums += sub // 8
                finish(total, q_scale, RECORD, to, c)
            x += block

    return product


def _unpack(type_id: int, words: bool) -> Any:
    """An intrinsic (w, codes, factors): two blocks of 32, or one of 256 -> codes, f32 scales, after 32 bytes minima."""
    from numba import types

    from .quants.emit import halves
    from .simd import F32, I8, I16, A, V, const_i, instruction, offset, splat, store

    codes_of, f = quants.block_codes(type_id), quants.FORMATS[type_id]

    @instruction(types.void, A, A, A)
    def unpack(b, w, codes, factors):
        if f.block == 256:
            q, scales, _, d, _ = codes_of(b, w)
            scales = b.fmul(b.sitofp(scales, V(F32, 8)), splat(b, d, 8))
        else:
            blocks = (w, offset(b, w, f.nbytes))
            q, scales = [codes_of(b, blocks)], halves(b, *blocks)
            if f.codes.centre is None:
                store(b, halves(b, *[offset(b, block, 2) for block in blocks]), offset(b, factors, 32))
        for i, v in enumerate(q):
            if words:
                v = b.sext(b.xor(v, const_i(-128, 64, I8)), V(I16, 64))
            store(b, v, offset(b, codes, i * v.type.count * v.type.element.width // 8))
        store(b, scales, factors)

    return unpack


def _unpack_256(type_id: int) -> Any:
    """An intrinsic (w, codes, factors): a block -> codes; scales, each twice in 32 bits; int16 -minima; d, dmin.

    A centre is a minimum as well, in units of d: scale · centre.
    """
    from llvmlite import ir
    from numba import types

    from .simd import F32, I16, I32, A, V, const_i, instruction, offset, store

    codes_of, f = quants.block_codes(type_id), quants.FORMATS[type_id]
    n = 256 // f.codes.sub

    @instruction(types.void, A, A, A)
    def unpack(b, w, codes, factors):
        q, scales, minima, d, dmin = codes_of(b, w)
        for i, v in enumerate(q):
            store(b, v, offset(b, codes, 64 * i))
        if minima is None:
            low = b.mul(scales, const_i(-f.codes.centre, n, I16))
        else:
            low = b.neg(minima)
        wide = b.zext(scales, V(I32, n))
        store(b, b.or_(wide, b.shl(wide, const_i(16, n))), factors)
        store(b, low, offset(b, factors, 4 * MINIMA_AT))
        both = b.insert_element(ir.Constant(V(F32, 2), ir.Undefined), d, ir.Constant(I32, 0))
        store(b, b.insert_element(both, dmin if minima else d, ir.Constant(I32, 1)), offset(b, factors, 4 * D_AT))

    return unpack


def _start(centre: int) -> Any:
    """(acc, sums, stride): acc[m, :] = c · sum[m] of the int8 under one scale; c is 1 for a format with minima."""
    from numba.extending import intrinsic

    from .microkernel import quad_sums
    from .simd import I16, I32, A, V, W, const_i, load, splat

    @intrinsic
    def start(_context, acc, sums, stride):
        def emit(context, b, sig, args):
            regs, address, stride = args
            for m in range(acc.M):
                both = b.bitcast(splat(b, load(b, address, I32)), V(I16, 2 * W))
                value = quad_sums(b, both, const_i(-centre, 2 * W, I16))
                for n in range(acc.N):
                    k = m * acc.N + n
                    regs = b.insert_value(regs, b.add(b.extract_value(regs, k), value), k)
                address = b.add(address, stride)
            return regs

        return acc(acc, A, A), emit

    return start


def _add_scaled() -> Any:
    """(acc, pairs, scales): acc[m, n] += scale[n] · the two halves of each lane of pairs[m, n]"""
    from numba.extending import intrinsic

    from .microkernel import _each, quad_sums
    from .simd import I16, A, V, W, load, offset

    @intrinsic
    def add_scaled(_context, acc, pairs, scales):
        def emit(context, b, sig, args):
            factors = [load(b, offset(b, args[2], 64 * n), V(I16, 2 * W), 4) for n in range(acc.N)]

            def add(m, n, v):
                x = b.bitcast(b.extract_value(args[1], m * acc.N + n), V(I16, 2 * W))
                return quad_sums(b, x, factors[n], v)

            return _each(b, args[0], acc, add)

        return acc(acc, pairs, A), emit

    return add_scaled
