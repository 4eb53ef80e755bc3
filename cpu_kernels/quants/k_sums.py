"""The integer dot product of formats with 16 sub-blocks of 16: Q2_K, Q3_K, Q6_K. Imports Numba."""

from __future__ import annotations

from llvmlite import ir

from ..isa import ISA
from ..microkernel import quad_sums
from ..simd import F32, I8, I16, VF, V, const_i, fma_, load, offset, shuffle, splat
from .activations import SCALE, SUMS
from .emit import add_scaled_sums, half, scaled_quads, widen


def scaled_sums(b, codes, scales, x, start=None):
    """codes: four vectors of 64, 0..63; scales <16 x i16> -> start, 16 i32, plus sums of scale * code * x."""
    if ISA.vnni512:
        return scaled_quads(b, codes, x, scales, lambda i, j: 4 * i + j // 4, start)
    total = None
    for i, u in enumerate(codes):
        part = load(b, offset(b, x, 64 * i), V(I8, 64))
        total = add_scaled_sums(b, total, u, part, scales, lambda j: 4 * i + j // 4)  # noqa: B023
    return total if start is None else b.add(total, start)


def sums_of_16(b, factors, x):
    """factors <16 x i16> times the activations' sums of 16 -> 8 i32."""
    return quad_sums(b, factors, load(b, offset(b, x, SUMS), V(I16, 16)))


def add_centred(b, sums, codes, centre, scales, d, x):
    """sums + the dot product of d * scale * (code - centre); scales <16 x i8>, d the address of an f16."""
    scales = _widened(b, scales)
    low = widen(b, b.mul(sums_of_16(b, scales, x), const_i(-centre, 8)))
    total = b.sitofp(scaled_sums(b, codes, scales, x, low), VF)
    return fma_(b, total, splat(b, b.fmul(half(b, d), load(b, offset(b, x, SCALE), F32))), sums[0]), sums[1]


def _widened(b, scales):
    """As i16; on AVX-512 not by sext, for LLVM would shuffle the bytes and then widen every result."""
    if not ISA.avx512:
        return b.sext(scales, V(I16, 16))
    pairs = shuffle(b, ir.Constant(scales.type, None), scales, [i // 2 + 16 * (i % 2) for i in range(32)])
    return b.ashr(b.bitcast(pairs, V(I16, 16)), const_i(8, 16, I16))
