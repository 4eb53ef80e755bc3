"""IQ4_NL and IQ4_XS: values of 4 bits that index a table of 16 unevenly spaced int8.

    IQ4_NL   32 values in 18 bytes      | d f16 | 16 bytes qs |
             value = d * TABLE[q], q lies as in Q4_0
    IQ4_XS   256 values in 136 bytes    | d f16 | scales_h u16 | 4 bytes scales_l | 128 bytes qs |
             value = d * (scale - 32) * TABLE[q], 8 sub-blocks of 32, each 16 bytes that lie as in Q4_0

Scale i of IQ4_XS has the low four bits nibble i of scales_l, and above them bits 2i and 2i + 1 of scales_h.
"""

from __future__ import annotations

from llvmlite import ir

from ..isa import ISA
from ..simd import F32, I8, I16, I32, VF, V, W, const_i, fma_, load, offset, splat
from .activations import SCALE
from .emit import (
    add_scaled_sums,
    columns,
    half,
    lookup,
    magnitude,
    nibbles,
    signed,
    take,
)

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode_iq4_nl(b, w):
    d, q = splat(b, half(b, w)), lookup(b, TABLE, nibbles(b, offset(b, w, 2)))
    for c, lanes in columns(q):
        yield c, b.fmul(signed(b, take(b, q, lanes)), d)


def _scales(b, w):
    """8 i32, -32..31."""
    lanes = V(I32, 8)
    low, high = load(b, offset(b, w, 4), I32), b.zext(load(b, offset(b, w, 2), I16), I32)

    def field(x, bits):
        shifted = b.lshr(splat(b, x, 8), ir.Constant(lanes, [bits * i for i in range(8)]))
        return b.and_(shifted, const_i((1 << bits) - 1, 8))

    return b.sub(b.or_(field(low, 4), b.shl(field(high, 2), const_i(4, 8))), const_i(32, 8))


def _values(b, w, i):
    """64 int8 from column 64i."""
    return lookup(b, TABLE, nibbles(b, *[offset(b, w, 8 + 32 * i + 16 * j) for j in range(2)]))


def _factors(b, w):
    """8 f32 scales"""
    return b.fmul(b.sitofp(_scales(b, w), V(F32, 8)), splat(b, half(b, w), 8))


def decode_iq4_xs(b, w):
    scales = _factors(b, w)
    for i in range(4):
        q = _values(b, w, i)
        for c, lanes in columns(q):
            yield 64 * i + c, b.fmul(signed(b, take(b, q, lanes)), take(b, scales, [2 * i + c // 32] * W))


def dot_iq4_xs(b, sums, w, x):
    scales = b.trunc(_scales(b, w), V(I16, 8))
    total = None
    for i in range(4):
        q, part = _values(b, w, i), load(b, offset(b, x, 64 * i), V(I8, 64))
        if not ISA.dotprod:
            q, part = magnitude(b, q, part)
        total = add_scaled_sums(b, total, q, part, scales, lambda j: 2 * i + j // 8)  # noqa: B023
    factor = b.fmul(half(b, w), load(b, offset(b, x, SCALE), F32))
    return fma_(b, b.sitofp(total, VF), splat(b, factor), sums[0]), sums[1]


def codes_iq4_nl(b, blocks):
    return b.xor(lookup(b, TABLE, nibbles(b, *[offset(b, w, 2) for w in blocks])), const_i(-128, 64, I8))


def codes_iq4_xs(b, w):
    codes = [b.xor(_values(b, w, i), const_i(-128, 64, I8)) for i in range(4)]
    return codes, b.trunc(_scales(b, w), V(I16, 8)), None, half(b, w), None
