"""Q4_K and Q5_K: 256 values of 4 and 5 bits in 144 and 176 bytes; 8 sub-blocks of 32 with scale and minimum.

    Q4_K   | d f16 | dmin f16 | 12 bytes: 8 scales, 8 minima of 6 bits |               128 bytes qs |
    Q5_K   | d f16 | dmin f16 | 12 bytes: 8 scales, 8 minima of 6 bits | 32 bytes qh | 128 bytes qs |

    value = d * scale * q - dmin * minimum

Activations are q8_nibbles, so that 64 bytes of qs are used as they come, and have sums of 32, one for each minimum. One
Zen 4 core out of the second cache, one token, 2,048 columns, GB/s: Q4_K 26.6 -> 34.7, Q5_K 25.3 -> 32.2. A third of
that is emit.affine, the rest fewer loads, and scales and minima unpacked in vectors: 71 -> 44 instructions a block,
where both the decoder (6 a cycle) and the pipes were busy.

Sub-blocks 2i and 2i + 1 are the low and the high nibbles of bytes 32i..32i+31 of qs; bit 4 of value l of sub-block i
is bit i of qh[l]. In the 12 bytes s, for i < 4:

    scale i = s[i] & 63        scale i + 4 = (s[i + 8] & 15) | (s[i]     >> 6) << 4
    min   i = s[i + 4] & 63    min   i + 4 = (s[i + 8] >> 4) | (s[i + 4] >> 6) << 4
"""

from __future__ import annotations

import functools

from llvmlite import ir

from ..isa import ISA
from ..microkernel import pair_sums, quad_sums
from ..simd import F16, F32, I8, I16, I32, I64, VF, V, W, concat, const_i, fma_, load, offset, shuffle, splat
from .activations import SCALE, SUMS
from .emit import add_scaled_sums, fields, half, scaled_quads, take, unsigned, widen


def _scales(b, w):
    """8 scales and 8 minima, each as the bytes of an i64."""
    s = [load(b, offset(b, w, 4 + 4 * i), I32) for i in range(3)]

    def masked(x, shift, mask):
        return b.and_(b.lshr(x, ir.Constant(I32, shift)), ir.Constant(I32, mask))

    def eight(low, high):
        return b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), ir.Constant(I64, 32)))

    def top(x):
        return b.shl(masked(x, 6, 0x03030303), ir.Constant(I32, 4))

    scales = eight(masked(s[0], 0, 0x3F3F3F3F), b.or_(masked(s[2], 0, 0x0F0F0F0F), top(s[0])))
    minima = eight(masked(s[1], 0, 0x3F3F3F3F), b.or_(masked(s[2], 4, 0x0F0F0F0F), top(s[1])))
    return scales, minima


def _codes(b, w, high):
    """Yields four vectors of 64 codes, in the order of q8_nibbles; high: whether there are fifth bits."""
    for i in range(4):
        qs = load(b, offset(b, w, (48 if high else 16) + i // 2 * 64), V(I8, 64))
        q = fields(b, qs, (i % 2 * 4,), 15, then_or=high)
        if high:
            qh, sub = load(b, offset(b, w, 16), V(I8, 32)), _sub(i, 0)
            q = b.or_(q, fields(b, concat(b, qh, qh), (sub - 4, sub - 2), 16))
        yield q


def _factors(b, w):
    """8 f32 scales and 8 minima, as values use them."""
    scales, minima = (b.uitofp(b.bitcast(v, V(I8, 8)), V(F32, 8)) for v in _scales(b, w))
    return b.fmul(scales, splat(b, half(b, w), 8)), b.fmul(minima, splat(b, half(b, offset(b, w, 2)), 8))


def _in_order(b, w, high):
    """Four vectors of 64 codes, in natural order."""
    codes = list(_codes(b, w, high))
    return [
        shuffle(b, codes[i], codes[i + 1], [*range(32 * h, 32 * h + 32), *range(64 + 32 * h, 96 + 32 * h)])
        for i in (0, 2)
        for h in range(2)
    ]


def _decode(b, w, high):
    scales, minima = _factors(b, w)
    for i, q in enumerate(_in_order(b, w, high)):
        for c in range(0, 64, W):
            sub = [2 * i + c // 32] * W
            product = b.fmul(unsigned(b, take(b, q, range(c, c + W))), take(b, scales, sub))
            yield 64 * i + c, b.fsub(product, take(b, minima, sub))


def _minima_and_scales(b, w):
    """8 of each, as int16: what _scales does, in 6 instructions of vectors instead of 25."""
    header, lanes = load(b, w, V(I8, 16)), V(I16, 16)
    # a lane has in its lower byte that of the low four or six bits, in its upper that of the other two
    low = [8, 9, 10, 11, 12, 13, 14, 15, 4, 5, 6, 7, 12, 13, 14, 15]
    high = [8, 9, 10, 11, 8, 9, 10, 11, 4, 5, 6, 7, 4, 5, 6, 7]
    both = b.bitcast(take(b, header, [at for pair in zip(low, high, strict=True) for at in pair]), lanes)
    low = b.lshr(both, ir.Constant(lanes, [0] * 4 + [4] * 4 + [0] * 8))
    low = b.and_(low, ir.Constant(lanes, ([63] * 4 + [15] * 4) * 2))
    high = b.and_(b.lshr(both, const_i(10, 16, I16)), ir.Constant(lanes, ([0] * 4 + [48] * 4) * 2))
    return b.or_(low, high)


def _sub(i, j):
    """The sub-block of codes 4j..4j+3 of vector i, in the order of q8_nibbles."""
    return i // 2 * 4 + i % 2 + j // 8 * 2


def _scaled_sums(b, codes, x, scales):
    """codes: four vectors of 64; scales as _scales gives them -> 16 i32 whose sum is that of scale * code * x."""
    # the scales repeated in every 16 bytes, so that the shuffles below stay within 128-bit lanes
    spread, zeros = b.bitcast(splat(b, scales, 8), V(I8, 64)), ir.Constant(V(I8, 64), None)
    total = None
    for i, u in enumerate(codes):
        part = load(b, offset(b, x, 64 * i), V(I8, 64))
        if ISA.dotprod:
            total = add_scaled_sums(b, total, u, part, _wide(b, scales), functools.partial(_sub, i))
        else:
            index = [64 if j % 2 else j // 16 * 16 + _sub(i, j // 4) for j in range(64)]
            factors = b.bitcast(shuffle(b, spread, zeros, index), V(I16, 32))
            total = quad_sums(b, pair_sums(b, u, part), factors, total)
    return total


def _wide(b, eight):
    return b.zext(b.bitcast(eight, V(I8, 8)), V(I16, 8))


def _dot(b, sums, w, x, high):
    main, left_out = sums
    codes = _codes(b, w, high)
    if ISA.vnni512:
        minima = _minima_and_scales(b, w)  # the scales meet zeros
        total = scaled_quads(b, codes, x, minima, lambda i, j: 8 + _sub(i, j))
    else:
        scales, minima = _scales(b, w)
        minima = widen(b, _wide(b, minima))
        total = _scaled_sums(b, codes, x, scales)
    low = quad_sums(b, minima, load(b, offset(b, x, SUMS), V(I16, 16)))
    factors = b.fmul(
        b.fpext(load(b, w, V(F16, 2)), V(F32, 2)), splat(b, load(b, offset(b, x, SCALE), F32), 2)
    )  # d and dmin
    left_out = fma_(b, b.sitofp(low, V(F32, 8)), take(b, factors, [1] * 8), left_out)
    return fma_(b, b.sitofp(total, VF), take(b, factors, [0] * W), main), left_out


def _block(b, w, high):
    scales, minima = (_wide(b, v) for v in _scales(b, w))
    return _in_order(b, w, high), scales, minima, half(b, w), half(b, offset(b, w, 2))


def decode_q4_k(b, w):
    return _decode(b, w, high=False)


def decode_q5_k(b, w):
    return _decode(b, w, high=True)


def dot_q4_k(b, sums, w, x):
    return _dot(b, sums, w, x, high=False)


def dot_q5_k(b, sums, w, x):
    return _dot(b, sums, w, x, high=True)


def codes_q4_k(b, w):
    return _block(b, w, high=False)


def codes_q5_k(b, w):
    return _block(b, w, high=True)
