"""RMS norm of rows: out = x / sqrt(mean(x²) + eps) · weight, sums in f32 over 16 lanes."""

from typing import Any

import numpy as np

from ._jit import f32, kernel
from .check import rows_f32


@kernel
def rms_norm_row():
    """One row a tile."""
    from .simd import bc, fma, hsum, ld, ld_scalar, st, st_scalar

    def body(tile, scratch, x, x_stride, weight, out, out_stride, n, eps: f32):
        x += tile * x_stride
        out += tile * out_stride
        acc = bc(0.0)
        whole = n // 16 * 16
        for i in range(0, whole, 16):
            v = ld(x + 4 * i)
            acc = fma(v, v, acc)
        total = hsum(acc)
        for i in range(whole, n):
            total += ld_scalar(x + 4 * i) * ld_scalar(x + 4 * i)
        factor = (total / n + eps) ** -0.5
        for i in range(0, whole, 16):
            st(out + 4 * i, ld(x + 4 * i) * bc(factor) * ld(weight + 4 * i))
        for i in range(whole, n):
            st_scalar(out + 4 * i, ld_scalar(x + 4 * i) * factor * ld_scalar(weight + 4 * i))

    return body


def rms_norm(run: Any, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """out (n_tok, n) = RMS norm of x (n_tok, n) f32 times weight (n,) f32; out may be x."""
    n_tok, n = rows_f32("x", x, 2)
    rows_f32("out", out, 2, (n_tok, n))
    rows_f32("weight", weight, 1, (n,))
    run.launch(rms_norm_row(), n_tok, (x, x.strides[0], weight, out, out.strides[0], n, float(eps)))
