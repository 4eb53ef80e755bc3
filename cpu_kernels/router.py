"""The router of a mixture of experts: which experts a token goes to, and with what weights.

probs = softmax or sigmoid of the logits; chosen by probs + bias, within the best groups; weighted by probs.
"""

from typing import Any

import numpy as np

from ._jit import f32, kernel
from .check import array, rows_f32

MIN_SUM = 6.103515625e-05  # of weights, when they are normalised: the smallest normal f16


@kernel
def route_token(gating, has_bias, norm):
    """One token a tile. Scratch: probabilities, then what the choice goes by."""
    import math

    from .simd import ld_scalar, st_i32, st_scalar

    def body(tile, scratch, logits, stride, bias, n_expert, n_group, n_group_used, n_used, scale: f32, ids, weights):
        logits += tile * stride
        probs, select, groups = scratch, scratch + 4 * n_expert, scratch + 8 * n_expert
        if gating == "softmax":
            top = ld_scalar(logits)
            for e in range(1, n_expert):
                top = max(top, ld_scalar(logits + 4 * e))
            total = 0.0
            for e in range(n_expert):
                p = math.exp(ld_scalar(logits + 4 * e) - top)
                total += p
                st_scalar(probs + 4 * e, p)
            for e in range(n_expert):
                st_scalar(probs + 4 * e, ld_scalar(probs + 4 * e) / total)
        else:
            for e in range(n_expert):
                st_scalar(probs + 4 * e, 1.0 / (1.0 + math.exp(-ld_scalar(logits + 4 * e))))
        for e in range(n_expert):
            s = ld_scalar(probs + 4 * e)
            if has_bias:
                s += ld_scalar(bias + 4 * e)
            st_scalar(select + 4 * e, s)

        if n_group > 1:
            size = n_expert // n_group
            for g in range(n_group):  # a group is worth its two best
                first, second = -math.inf, -math.inf
                for e in range(g * size, g * size + size):
                    s = ld_scalar(select + 4 * e)
                    if s > first:
                        first, second = s, first
                    elif s > second:
                        second = s
                st_scalar(groups + 4 * g, first + second if size > 1 else first)
            for _ in range(n_group - n_group_used):  # take the worst out, of equals the last
                worst = -1
                for g in range(n_group):
                    value = ld_scalar(groups + 4 * g)
                    if value < math.inf and (worst < 0 or value <= ld_scalar(groups + 4 * worst)):
                        worst = g
                st_scalar(groups + 4 * worst, math.inf)
                for e in range(worst * size, worst * size + size):
                    st_scalar(select + 4 * e, -math.inf)

        total = 0.0
        for i in range(n_used):
            best = 0
            for e in range(1, n_expert):
                if ld_scalar(select + 4 * e) > ld_scalar(select + 4 * best):
                    best = e
            st_scalar(select + 4 * best, -math.inf)
            p = ld_scalar(probs + 4 * best)
            total += p
            st_i32(ids + 4 * (tile * n_used + i), best)
            st_scalar(weights + 4 * (tile * n_used + i), p)
        factor = scale / max(total, MIN_SUM) if norm else scale * 1.0
        for i in range(n_used):
            at = weights + 4 * (tile * n_used + i)
            st_scalar(at, ld_scalar(at) * factor)

    return body


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
    code = route_token(gating=gating, has_bias=bias is not None, norm=norm)
    args = (logits, logits.strides[0], 0 if bias is None else bias, n_expert, n_group, n_group_used, n_used)
    run.launch(code, n_tok, (*args, float(scale), ids, weights))
