"""SwiGLU on the GPU: cuda/small.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._compile import kernel
from .check import rows_f32, steps

SWIGLU = kernel("small.cu", "swiglu")
VALUES = 1024  # of a row, a block


def swiglu(run: Any, gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, n) = silu(gate) * up, all f32; n a multiple of 16; out may be gate."""
    n_tok, n = rows_f32("gate", gate, 2)
    rows_f32("up", up, 2, (n_tok, n))
    rows_f32("out", out, 2, (n_tok, n))
    if n % 16:
        raise ValueError(f"rows of {n} values; expected a multiple of 16")
    args = (gate, *steps("gate", gate), up, *steps("up", up), out, *steps("out", out), n)
    run.launch(SWIGLU, (-(-n // VALUES), n_tok), 256, 0, args)
