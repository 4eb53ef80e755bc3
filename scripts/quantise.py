"""Floats to ggml blocks: plain quantisers for every weight type that konly runs.

    blocks = quantise(x, GGMLQuantizationType.Q4_K)      # (..., n) f32 -> (..., row bytes) u8

For synthetic models and tests: each value goes to the nearest code under scales taken from the extremes
of its sub-block, without the search and the importance weights of llama-quantize.  The PyPI package gguf
quantises the 32-value formats; the K and IQ4 formats, which it only reads, are written here.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

# where the f16 scales sit in a block: multiplying these scales its values
HALF_AT = {
    T.Q4_0: (0,), T.Q4_1: (0, 2), T.Q5_0: (0,), T.Q5_1: (0, 2), T.Q8_0: (0,), T.Q2_K: (80, 82), T.Q3_K: (108,),
    T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,), T.IQ4_NL: (0,), T.IQ4_XS: (0,),
}  # fmt: skip


def quantise(x: np.ndarray, kind: T) -> np.ndarray:
    """(..., n) f32 -> (..., n / block * block bytes) u8; n is a multiple of the block."""
    x = np.ascontiguousarray(x, np.float32)
    if kind == T.F32:
        return x.view(np.uint8)
    if kind not in QUANTISERS:
        return gguf.quants.quantize(x, kind).view(np.uint8)
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return QUANTISERS[kind](x.reshape(-1, block)).reshape(*x.shape[:-1], -1)


def scale_blocks(blocks: np.ndarray, kind: T, factor: float) -> np.ndarray:
    """A copy of blocks (n, block bytes) u8 whose values are `factor` times as large."""
    out = blocks.copy()
    for at in HALF_AT[kind]:
        half = out[:, at : at + 2].copy().view(np.float16).astype(np.float32) * np.float32(factor)
        out[:, at : at + 2] = _half(half[:, 0])
    return out


def _q2_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, low, q = _with_minimum(x.reshape(-1, 16, 16), q_max=3, scale_max=15)
    return np.hstack([scale | low << 4, _pack_2bit(q), _half(d), _half(dmin)])


def _q3_k(x: np.ndarray) -> np.ndarray:
    d, scale, q = _symmetric(x.reshape(-1, 16, 16), q_min=-4, scale_min=-32)
    q = (q + 4).astype(np.uint8)
    high = (q >> 2).reshape(-1, 8, 32)
    mask = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    s = (scale + 32).astype(np.uint8)  # (n, 16), 6 bits
    top = (s >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed = np.hstack([(s[:, :8] & 15) | (s[:, 8:] & 15) << 4, np.bitwise_or.reduce(top, axis=1)])
    return np.hstack([mask, _pack_2bit(q & 3), packed, _half(d)])


def _q4_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, low, q = _with_minimum(x.reshape(-1, 8, 32), q_max=15, scale_max=63)
    return np.hstack([_half(d), _half(dmin), _pack_6bit(scale, low), _pack_nibbles(q)])


def _q5_k(x: np.ndarray) -> np.ndarray:
    d, dmin, scale, low, q = _with_minimum(x.reshape(-1, 8, 32), q_max=31, scale_max=63)
    high = np.bitwise_or.reduce((q >> 4) << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.hstack([_half(d), _half(dmin), _pack_6bit(scale, low), high, _pack_nibbles(q & 15)])


def _q6_k(x: np.ndarray) -> np.ndarray:
    d, scale, q = _symmetric(x.reshape(-1, 16, 16), q_min=-32, scale_min=-128)
    q = (q + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # half, group, value
    low = q & 15
    ql = (low[:, :, 0:2] | low[:, :, 2:4] << 4).reshape(-1, 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    qh = np.bitwise_or.reduce((q >> 4) << shifts, axis=2).reshape(-1, 64)
    return np.hstack([ql, qh, scale.astype(np.int8).view(np.uint8), _half(d)])


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    d = _extreme(x) / np.float32(-127)
    codes = _nearest_iq4(_divide(x, _through_half(d)[:, None]))
    return np.hstack([_half(d), codes[:, :16] | codes[:, 16:] << 4])


def _iq4_xs(x: np.ndarray) -> np.ndarray:
    x = x.reshape(-1, 8, 32)
    wanted = _extreme(x) / np.float32(-127)  # (n, 8)
    d = _extreme(wanted) / np.float32(-32)
    scale = np.clip(np.rint(_divide(wanted, _through_half(d)[:, None])), -32, 31)
    codes = _nearest_iq4(_divide(x, (_through_half(d)[:, None] * scale)[:, :, None]))
    s = (scale + 32).astype(np.uint16)
    high = np.bitwise_or.reduce((s >> 4) << np.arange(0, 16, 2, dtype=np.uint16), axis=1)
    low = (s & 15).astype(np.uint8)
    qs = (codes[:, :, :16] | codes[:, :, 16:] << 4).reshape(-1, 128)
    return np.hstack([_half(d), high[:, None].view(np.uint8), low[:, 0::2] | low[:, 1::2] << 4, qs])


QUANTISERS: dict[T, Callable[[np.ndarray], np.ndarray]] = {
    T.Q2_K: _q2_k, T.Q3_K: _q3_k, T.Q4_K: _q4_k, T.Q5_K: _q5_k, T.Q6_K: _q6_k, T.IQ4_NL: _iq4_nl, T.IQ4_XS: _iq4_xs,
}  # fmt: skip


def _with_minimum(x: np.ndarray, q_max: int, scale_max: int) -> tuple[np.ndarray, ...]:
    """x (n, sub-blocks, values) as d * scale * q - dmin * low -> d, dmin (n,), scale, low (n, sub-blocks), q."""
    top, bottom = np.maximum(x.max(2), 0), np.minimum(x.min(2), 0)
    step = (top - bottom) / np.float32(q_max)
    d, dmin = step.max(1) / np.float32(scale_max), -bottom.min(1) / np.float32(scale_max)
    df, mf = _through_half(d)[:, None], _through_half(dmin)[:, None]
    scale = np.clip(np.rint(_divide(step, df)), 0, scale_max)
    low = np.clip(np.rint(_divide(-bottom, mf)), 0, scale_max)
    q = np.clip(np.rint(_divide(x + (mf * low)[:, :, None], (df * scale)[:, :, None])), 0, q_max)
    return d, dmin, scale.astype(np.uint8), low.astype(np.uint8), q.astype(np.uint8)


def _symmetric(x: np.ndarray, q_min: int, scale_min: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (n, sub-blocks, values) as d * scale * q, q_min <= q < -q_min -> d (n,), scale (n, sub-blocks), q."""
    wanted = _extreme(x) / np.float32(q_min)
    d = _extreme(wanted) / np.float32(scale_min)
    df = _through_half(d)[:, None]
    scale = np.clip(np.rint(_divide(wanted, df)), scale_min, -scale_min - 1)
    q = np.clip(np.rint(_divide(x, (df * scale)[:, :, None])), q_min, -q_min - 1)
    return d, scale.astype(np.int16), q.astype(np.int16)


def _extreme(x: np.ndarray) -> np.ndarray:
    """The value of largest magnitude along the last axis, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)[..., 0]


def _nearest_iq4(x: np.ndarray) -> np.ndarray:
    between = (IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / 2
    return np.searchsorted(between, x).astype(np.uint8)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _through_half(d: np.ndarray) -> np.ndarray:
    return d.astype(np.float16).astype(np.float32)


def _half(d: np.ndarray) -> np.ndarray:
    """(n,) f32 -> (n, 2) u8."""
    return d.astype(np.float16)[:, None].view(np.uint8)


def _pack_2bit(q: np.ndarray) -> np.ndarray:
    """256 codes of 2 bits -> 64 bytes: byte l of a half holds value l of its four groups of 32."""
    shifted = q.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(shifted, axis=2).reshape(-1, 64)


def _pack_nibbles(q: np.ndarray) -> np.ndarray:
    """(n, 8, 32) codes of 4 bits -> (n, 128): even sub-blocks in the low nibbles of 32 bytes, odd in the high."""
    return (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, 128)


def _pack_6bit(scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima of 6 bits -> (n, 12), as Q4_K and Q5_K keep them."""
    first = np.hstack([scale[:, :4] | (scale[:, 4:] >> 4) << 6, low[:, :4] | (low[:, 4:] >> 4) << 6])
    return np.hstack([first, (scale[:, 4:] & 15) | (low[:, 4:] & 15) << 4])
