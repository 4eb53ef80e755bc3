"""Rotary position embedding of heads: pairs (2j, 2j+1), or (j, j + n/2) for NEOX, turn by the angle of their token.

x0' = x0·cos − x1·sin,  x1' = x0·sin + x1·cos
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import kernel
from .check import rows_f32


def rotation(neox: bool) -> Any:
    """A device function (x, cos_sin, out, n): turns n values at x; out may be x. For kernel factories."""
    from .simd import device, ld_scalar, st_scalar

    @device
    def rotate(x, cos_sin, out, n):
        half = n // 2
        for j in range(half):
            if neox:
                a, b = 4 * j, 4 * (j + half)
            else:
                a, b = 8 * j, 8 * j + 4
            c, s = ld_scalar(cos_sin + 4 * j), ld_scalar(cos_sin + 4 * (j + half))
            x0, x1 = ld_scalar(x + a), ld_scalar(x + b)
            st_scalar(out + a, x0 * c - x1 * s)
            st_scalar(out + b, x0 * s + x1 * c)

    return rotate


@kernel
def rope_token(neox):
    """All heads of one token a tile."""
    rotate = rotation(neox)

    def body(tile, scratch, x, x_stride, x_head, cos_sin, cos_sin_stride, out, out_stride, out_head, n_head, n_rot):
        for ih in range(n_head):
            rotate(
                x + tile * x_stride + ih * x_head,
                cos_sin + tile * cos_sin_stride,
                out + tile * out_stride + ih * out_head,
                n_rot,
            )

    return body


def rope(run: Any, x: np.ndarray, cos_sin: np.ndarray, out: np.ndarray, neox: bool = False) -> None:
    """out (n_tok, n_head, n_rot) f32 = x turned; out may be x. cos_sin (n_tok, n_rot) f32 is [cos | sin] of pairs."""
    n_tok, n_head, n_rot = rows_f32("x", x, 3)
    rows_f32("out", out, 3, (n_tok, n_head, n_rot))
    rows_f32("cos_sin", cos_sin, 2, (n_tok, n_rot))
    if n_rot % 2:
        raise ValueError(f"n_rot is {n_rot}; expected an even number")
    args = (x, *x.strides[:2], cos_sin, cos_sin.strides[0], out, *out.strides[:2], n_head, n_rot)
    run.launch(rope_token(neox=neox), n_tok, args)
