"""Rotary position embedding of heads on the GPU: cuda/small.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._compile import kernel
from .check import rows_f32, steps

ROPE = kernel("small.cu", "rope")


def rope(run: Any, x: np.ndarray, cos_sin: np.ndarray, out: np.ndarray, neox: bool = False) -> None:
    """out (n_tok, n_head, n_rot) f32 = x turned; out may be x. cos_sin (n_tok, n_rot) f32 is [cos | sin] of pairs."""
    n_tok, n_head, n_rot = rows_f32("x", x, 3)
    rows_f32("out", out, 3, (n_tok, n_head, n_rot))
    rows_f32("cos_sin", cos_sin, 2, (n_tok, n_rot))
    if n_rot % 2:
        raise ValueError(f"n_rot is {n_rot}; expected an even number")
    args = (x, *steps("x", x), cos_sin, *steps("cos_sin", cos_sin), out, *steps("out", out), n_head, n_rot, int(neox))
    run.launch(ROPE, (n_tok,), 256, 0, args)
