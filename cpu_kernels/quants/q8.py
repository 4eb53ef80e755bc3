"""Q8_0: 32 values in 34 bytes.

| d f16 | 32 int8 q |        value = d * q
"""

from __future__ import annotations

from ..simd import I8, VF, VI, V, W, concat, const_i, load, offset, splat
from .emit import half


def decode_q8_0(b, w):
    d = splat(b, half(b, w))
    for c in (0, 16):
        yield c, b.fmul(b.sitofp(b.sext(load(b, offset(b, w, 2 + c), V(I8, W)), VI), VF), d)


def codes_q8_0(b, blocks):
    q = concat(b, *[load(b, offset(b, w, 2), V(I8, 32)) for w in blocks])
    return b.xor(q, const_i(-128, 64, I8))
