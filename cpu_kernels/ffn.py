"""SwiGLU: out = silu(gate) · up, silu(z) = z / (1 + e^-z)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import kernel
from .check import rows_f32

TILE = 4096  # values


def silu_times() -> Any:
    """A device function of two vectors: silu(gate) · up. For kernel factories."""
    from .simd import bc, device, vexp2

    @device
    def swiglu(gate, up):
        return gate / (bc(1.0) + vexp2(gate * bc(-1.4426950408889634))) * up

    return swiglu


@kernel
def swiglu_piece():
    """TILE values of one row a tile."""
    from .simd import ld, st

    silu = silu_times()

    def body(tile, scratch, gate, gate_stride, up, up_stride, out, out_stride, n):
        pieces = (n + TILE - 1) // TILE
        row, piece = tile // pieces, tile % pieces
        gate += row * gate_stride
        up += row * up_stride
        out += row * out_stride
        for i in range(piece * TILE, min(n, piece * TILE + TILE), 16):
            st(out + 4 * i, silu(ld(gate + 4 * i), ld(up + 4 * i)))

    return body


def swiglu(run: Any, gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, n) = silu(gate) * up, all f32; n a multiple of 16; out may be gate."""
    n_tok, n = rows_f32("gate", gate, 2)
    rows_f32("up", up, 2, (n_tok, n))
    rows_f32("out", out, 2, (n_tok, n))
    if n % 16:
        raise ValueError(f"rows of {n} values; expected a multiple of 16")
    args = (gate, gate.strides[0], up, up.strides[0], out, out.strides[0], n)
    run.launch(swiglu_piece(), n_tok * -(-n // TILE), args)
