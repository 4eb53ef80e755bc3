"""Q6_K: 256 values of 6 bits in 210 bytes; 16 sub-blocks of 16 with a scale.

    | 128 bytes ql | 64 bytes qh | 16 int8 scales | d f16 |        value = d * scale * (q - 32)

Group g of 32 values, with half = g // 4 and k = g % 4: the lower four bits of value l are in
ql[64 * half + 32 * (k % 2) + l], its low nibble for k < 2, else its high one; the upper two are bits 2k and 2k + 1 of
qh[32 * half + l].

One Zen 4 core out of the second cache, one token, GB/s: 35.0 -> 39.1 with bit matrices for the upper bits (not for all
that is shifted: then the pipes of these and of the products were the limit, 37.5), scales widened before they are
shuffled, and the centre's part as what integer sums start from.
"""

from __future__ import annotations

from ..simd import I8, I16, V, W, concat, const_f, load, offset, splat
from .emit import fields, half, signed, take, unsigned
from .k_sums import add_centred


def _codes(b, w, i):
    """64 codes, 0..63, from column 64i."""
    pair, upper = i // 2, i % 2
    low = fields(b, load(b, offset(b, w, 64 * pair), V(I8, 64)), (4 * upper,), 15, then_or=True)
    qh = load(b, offset(b, w, 128 + 32 * pair), V(I8, 32))
    return b.or_(low, fields(b, concat(b, qh, qh), (4 * upper - 4, 4 * upper - 2), 0x30))


def _factors(b, w):
    """16 f32 scales"""
    return b.fmul(signed(b, load(b, offset(b, w, 192), V(I8, W))), splat(b, half(b, offset(b, w, 208))))


def decode_q6_k(b, w):
    scales = _factors(b, w)
    for i in range(4):
        q = _codes(b, w, i)
        for c in range(0, 64, W):
            centred = b.fsub(unsigned(b, take(b, q, range(c, c + W))), const_f(32.0))
            yield 64 * i + c, b.fmul(centred, take(b, scales, [4 * i + c // W] * W))


def dot_q6_k(b, sums, w, x):
    scales = load(b, offset(b, w, 192), V(I8, W))
    return add_centred(b, sums, [_codes(b, w, i) for i in range(4)], 32, scales, offset(b, w, 208), x)


def codes_q6_k(b, w):
    scales = b.sext(load(b, offset(b, w, 192), V(I8, W)), V(I16, W))
    return [_codes(b, w, i) for i in range(4)], scales, None, half(b, offset(b, w, 208)), None
