"""Q5_0 and Q5_1: 32 values of 5 bits in 22 and 24 bytes.

    Q5_0   | d f16 | qh u32 | 16 bytes qs |             value = d * (q - 16)
    Q5_1   | d f16 | m f16 | qh u32 | 16 bytes qs |     value = d * q + m

The lower four bits lie as in Q4_0; bit 4 of value j is bit j of qh.
"""

from __future__ import annotations

from llvmlite import ir

from ..isa import ISA
from ..simd import I8, I32, I64, V, concat, const_f, const_i, load, offset, splat
from .emit import columns, half, nibbles, take, unsigned


def _codes(b, blocks, qh):
    """32 codes, 0..31, of each block; qh is where the high bits are."""
    low = nibbles(b, *[offset(b, w, qh + 4) for w in blocks])
    n = low.type.count
    bits = [load(b, offset(b, w, qh), I32) for w in blocks]
    if ISA.avx512:  # the bits are a mask
        mask = bits[0] if n == 32 else b.or_(b.zext(bits[0], I64), b.shl(b.zext(bits[1], I64), ir.Constant(I64, 32)))
        return b.select(b.bitcast(mask, V(ir.IntType(1), n)), b.add(low, const_i(16, n, I8)), low)
    # every byte gets the one with its bit; the shuffle stays within 16 bytes
    near = concat(b, *[take(b, b.bitcast(splat(b, v, 8), V(I8, 32)), [j // 16 * 16 + j // 8 for j in range(32)])
                       for v in bits])  # fmt: skip
    own = ir.Constant(V(I8, n), [1 << j % 8 for j in range(n)])
    there = b.icmp_unsigned("==", b.and_(near, own), own)
    return b.or_(low, b.select(there, const_i(16, n, I8), const_i(0, n, I8)))


def decode_q5_0(b, w):
    d, q = splat(b, half(b, w)), _codes(b, [w], 2)
    for c, lanes in columns(q):
        yield c, b.fmul(b.fsub(unsigned(b, take(b, q, lanes)), const_f(16.0)), d)


def decode_q5_1(b, w):
    d, m, q = splat(b, half(b, w)), splat(b, half(b, offset(b, w, 2))), _codes(b, [w], 4)
    for c, lanes in columns(q):
        yield c, b.fadd(b.fmul(unsigned(b, take(b, q, lanes)), d), m)


def codes_q5_0(b, blocks):
    return _codes(b, blocks, 2)


def codes_q5_1(b, blocks):
    return _codes(b, blocks, 4)
