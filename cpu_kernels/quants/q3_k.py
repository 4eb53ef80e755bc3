"""Q3_K: 256 values of 3 bits in 110 bytes; 16 sub-blocks of 16 with a scale.

    | 32 bytes hmask | 64 bytes qs | 12 bytes: 16 scales of 6 bits | d f16 |      value = d * (scale - 32) * (q - 4)

The lower two bits of a value lie as in Q2_K; bit 2 of value l of group g of 32 is bit g of hmask[l]. In the 12
bytes s, scale i has the low four bits s[i] & 15 for i < 8, else s[i - 8] >> 4, and above them the two bits
(s[8 + i % 4] >> 2 * (i // 4)) & 3.
"""

from __future__ import annotations

from ..simd import I8, I16, V, W, concat, const_f, const_i, load, offset, splat
from .emit import fields, half, signed, take, unsigned
from .k_sums import add_centred
from .q2_k import two_bits


def _codes(b, w, i):
    """64 codes, 0..7, from column 64i."""
    mask = load(b, w, V(I8, 32))
    high = fields(b, concat(b, mask, mask), (2 * i - 2, 2 * i - 1), 4)
    return b.or_(two_bits(b, offset(b, w, 32), i), high)


def _scales(b, w):
    """16 int8, -32..31."""
    low, high = load(b, offset(b, w, 96), V(I8, 8)), load(b, offset(b, w, 104), V(I8, 4))
    low = fields(b, concat(b, low, low), (0, 4), 15)
    high = fields(b, concat(b, high, high, high, high), (-4, -2, 0, 2), 0x30)
    return b.sub(b.or_(low, high), const_i(32, W, I8))


def _factors(b, w):
    """16 f32 scales"""
    return b.fmul(signed(b, _scales(b, w)), splat(b, half(b, offset(b, w, 108))))


def decode_q3_k(b, w):
    scales = _factors(b, w)
    for i in range(4):
        q = _codes(b, w, i)
        for c in range(0, 64, W):
            centred = b.fsub(unsigned(b, take(b, q, range(c, c + W))), const_f(4.0))
            yield 64 * i + c, b.fmul(centred, take(b, scales, [4 * i + c // W] * W))


def dot_q3_k(b, sums, w, x):
    return add_centred(b, sums, [_codes(b, w, i) for i in range(4)], 4, _scales(b, w), offset(b, w, 108), x)


def codes_q3_k(b, w):
    scales = b.sext(_scales(b, w), V(I16, W))
    return [_codes(b, w, i) for i in range(4)], scales, None, half(b, offset(b, w, 108)), None
