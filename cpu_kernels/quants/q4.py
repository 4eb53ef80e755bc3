"""Q4_0 and Q4_1: 32 values of 4 bits in 18 and 20 bytes.

    Q4_0   | d f16 | 16 bytes qs |             value = d * (q - 8)
    Q4_1   | d f16 | m f16 | 16 bytes qs |     value = d * q + m

Value j < 16 is the low nibble of qs[j], value 16 + j the high one.
"""

from __future__ import annotations

from ..simd import const_f, offset, splat
from .emit import columns, half, nibbles, take, unsigned


def decode_q4_0(b, w):
    d, q = splat(b, half(b, w)), nibbles(b, offset(b, w, 2))
    for c, lanes in columns(q):
        yield c, b.fmul(b.fsub(unsigned(b, take(b, q, lanes)), const_f(8.0)), d)


def decode_q4_1(b, w):
    d, m, q = splat(b, half(b, w)), splat(b, half(b, offset(b, w, 2))), nibbles(b, offset(b, w, 4))
    for c, lanes in columns(q):
        yield c, b.fadd(b.fmul(unsigned(b, take(b, q, lanes)), d), m)


def codes_q4_0(b, blocks):
    return nibbles(b, *[offset(b, w, 2) for w in blocks])


def codes_q4_1(b, blocks):
    return nibbles(b, *[offset(b, w, 4) for w in blocks])
