"""F32, F16, BF16: no blocks; 32 values at a time here.

F32   | 32 f32: value |      F16  | 32 f16: value |      BF16  | 32 u16: the upper half of an f32 |
"""

from __future__ import annotations

from ..simd import F16, I16, VF, VI, V, W, const_i, load, offset


def decode_f32(b, w):
    for c in (0, 16):
        yield c, load(b, offset(b, w, 4 * c), VF)


def decode_f16(b, w):
    for c in (0, 16):
        yield c, b.fpext(load(b, offset(b, w, 2 * c), V(F16, W)), VF)


def decode_bf16(b, w):
    for c in (0, 16):
        yield c, b.bitcast(b.shl(b.zext(load(b, offset(b, w, 2 * c), V(I16, W)), VI), const_i(16)), VF)
