"""The integer dot product of formats with 16 sub-blocks of 16: Q2_K, Q3_K, Q6_K. Imports Numba."""

from __future__ import annotations

from ..isa import ISA
from ..microkernel import quad_sums
from ..simd import F32, I8, I16, VF, V, const_i, fma_, load, offset, splat
from .activations import SCALE, SUMS
from .emit import add_scaled_sums, half, scaled_quads, widen


def scaled_sums(b, codes, scales, x):
    """codes: four vectors of 64, 0..63; scales <16 x i16> -> 16 i32 whose sum is that of scale * code * x."""
    if ISA.vnni512:
        return scaled_quads(b, codes, x, scales, lambda i, j: 4 * i + j // 4)
    total = None
    for i, u in enumerate(codes):
        part = load(b, offset(b, x, 64 * i), V(I8, 64))
        total = add_scaled_sums(b, total, u, part, scales, lambda j: 4 * i + j // 4)  # noqa: B023
    return total


def sums_of_16(b, factors, x):
    """factors <16 x i16> times the activations' sums of 16 -> 8 i32."""
    return quad_sums(b, factors, load(b, offset(b, x, SUMS), V(I16, 16)))


def add_centred(b, sums, codes, centre, scales, d, x):
    """sums + the dot product of d * scale * (code - centre); scales <16 x i8>, d the address of an f16."""
    scales = b.sext(scales, V(I16, 16))
    low = b.mul(widen(b, sums_of_16(b, scales, x)), const_i(centre))
    total = b.sitofp(b.sub(scaled_sums(b, codes, scales, x), low), VF)
    return fma_(b, total, splat(b, b.fmul(half(b, d), load(b, offset(b, x, SCALE), F32))), sums[0]), sums[1]
