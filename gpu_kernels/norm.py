"""RMS norm of rows on the GPU: cuda/small.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._compile import kernel
from .check import rows_f32, steps

RMS_NORM = kernel("small.cu", "rms_norm")


def rms_norm(run: Any, x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """out (n_tok, n) = RMS norm of x (n_tok, n) f32 times weight (n,) f32; out may be x."""
    n_tok, n = rows_f32("x", x, 2)
    rows_f32("out", out, 2, (n_tok, n))
    rows_f32("weight", weight, 1, (n,))
    run.launch(RMS_NORM, (n_tok,), 256, 32, (x, *steps("x", x), weight, float(eps), out, *steps("out", out), n))
