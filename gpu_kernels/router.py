"""The router of a mixture of experts on the GPU: cuda/route.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._compile import kernel
from .check import array, rows_f32, steps

ROUTE = kernel("route.cu", "route")
MIN_SUM = 6.103515625e-05  # of weights, when they are normalised: the smallest normal f16


def route(
    run: Any, logits: np.ndarray, bias: np.ndarray | None, gating: str, n_group: int, n_group_used: int, norm: bool,
    scale: float, ids: np.ndarray, weights: np.ndarray,
) -> None:  # fmt: skip
    """Choose ids (n_tok, n_used) int32 and weights (n_tok, n_used) f32 from logits (n_tok, n_expert) f32.

    gating 'softmax' | 'sigmoid'; bias (n_expert,) f32 goes into the choice alone; only the n_group_used best of n_group
    groups (by the sum of their two best) are eligible; of equals the lower index; norm, then scale.
    """
    n_tok, n_expert = rows_f32("logits", logits, 2)
    n_used = ids.shape[1]
    array("ids", ids, np.int32, 2, (n_tok, n_used))
    rows_f32("weights", weights, 2, (n_tok, n_used))
    if gating not in ("softmax", "sigmoid") or not n_used <= n_expert <= 4096 or n_expert % n_group:
        raise ValueError(f"route: {gating}, {n_used} of {n_expert} experts in {n_group} groups")
    if bias is not None:
        rows_f32("bias", bias, 1, (n_expert,))
    assert ids.flags.c_contiguous and weights.flags.c_contiguous
    run.launch(
        ROUTE, (n_tok,), 32, 8 * (n_expert + n_group),
        (logits, *steps("logits", logits), bias, int(gating == "softmax"), n_expert, n_group, n_group_used, n_used,
         int(norm), MIN_SUM, float(scale), ids, weights),
    )  # fmt: skip
