"""Q2_K: 256 values of 2 bits in 84 bytes; 16 sub-blocks of 16 with scale and minimum.

    | 16 bytes: scale in the low nibble, minimum in the high | 64 bytes qs | d f16 | dmin f16 |

    value = d * scale * q - dmin * minimum

Value l of group g of 32 is (qs[32 * (g // 4) + l] >> 2 * (g % 4)) & 3.
"""

from __future__ import annotations

from ..simd import F16, F32, I8, I16, VF, V, W, concat, fma_, load, offset, splat
from .activations import SCALE
from .emit import fields, half, take, unsigned
from .k_sums import scaled_sums, sums_of_16


def two_bits(b, qs, i):
    """64 codes, 0..3, from column 64i; qs is the address of the 64 bytes. Q3_K has them too."""
    q = load(b, offset(b, qs, i // 2 * 32), V(I8, 32))
    return fields(b, concat(b, q, q), (i % 2 * 4, i % 2 * 4 + 2), 3)


def _scales(b, w):
    packed = load(b, w, V(I8, W))
    return fields(b, packed, (0,), 15), fields(b, packed, (4,), 15)


def decode_q2_k(b, w):
    scales, minima = (unsigned(b, v) for v in _scales(b, w))
    scales = b.fmul(scales, splat(b, half(b, offset(b, w, 80))))
    minima = b.fmul(minima, splat(b, half(b, offset(b, w, 82))))
    for i in range(4):
        q = two_bits(b, offset(b, w, 16), i)
        for c in range(0, 64, W):
            sub = [4 * i + c // W] * W
            product = b.fmul(unsigned(b, take(b, q, range(c, c + W))), take(b, scales, sub))
            yield 64 * i + c, b.fsub(product, take(b, minima, sub))


def dot_q2_k(b, sums, w, x):
    scales, minima = (b.zext(v, V(I16, W)) for v in _scales(b, w))
    total = scaled_sums(b, [two_bits(b, offset(b, w, 16), i) for i in range(4)], scales, x)
    low = sums_of_16(b, minima, x)
    factors = b.fmul(
        b.fpext(load(b, offset(b, w, 80), V(F16, 2)), V(F32, 2)), splat(b, load(b, offset(b, x, SCALE), F32), 2)
    )  # d and dmin
    left_out = fma_(b, b.sitofp(low, V(F32, 8)), take(b, factors, [1] * 8), sums[1])
    return fma_(b, b.sitofp(total, VF), take(b, factors, [0] * W), sums[0]), left_out
