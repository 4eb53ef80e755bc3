"""Mixture of experts: the router's choice, and the products with the chosen experts.

route    probs = softmax or sigmoid of the logits; chosen by probs + bias, within the best groups; weighted by probs
experts  out[t] += sum over its slots s of weight[t, s] · down_e(silu(gate_e x) · (up_e x)),  e = ids[t, s]

A slot is a pair (token, choice). Its products are those of a plain matrix, on rows found through the expert's id, which
is read when the job runs; slots are summed in the order of choice.
"""

from typing import Any

import numpy as np

from . import quants
from ._jit import f32, kernel
from .check import array, rows_f32
from .ffn import swiglu
from .matmul import TILE_BYTES, quantised

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


@kernel
def expert_rows(type_id):
    """A tile: n_block rows of one slot's expert, times the activations of its token (or of the slot itself)."""
    from .simd import ld_i32, st_scalar

    row_dot = quants.row_dot(type_id)

    def body(tile, scratch, w, w_expert, w_row, n_rows, n_block, ids, x, x_stride, slots_per_x, out, k):
        blocks = (n_rows + n_block - 1) // n_block
        slot, first = tile // blocks, tile % blocks * n_block
        w += ld_i32(ids + 4 * slot) * w_expert + first * w_row
        x += slot // slots_per_x * x_stride
        out += 4 * (slot * n_rows + first)
        for r in range(min(n_block, n_rows - first)):
            st_scalar(out + 4 * r, row_dot(w + r * w_row, x, k))

    return body


@kernel
def add_slots():
    """One token a tile: out += sum of its slots, weighted, in the order of choice."""
    from .simd import bc, fma, ld, ld_scalar, st

    def body(tile, scratch, slots, weights, n_used, out, out_stride, n):
        slots += 4 * tile * n_used * n
        weights += 4 * tile * n_used
        out += tile * out_stride
        for i in range(0, n, 16):
            total = bc(0.0)
            for s in range(n_used):
                total = fma(ld(slots + 4 * (s * n + i)), bc(ld_scalar(weights + 4 * s)), total)
            st(out + 4 * i, ld(out + 4 * i) + total)

    return body


def experts(
    run: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, out: np.ndarray
) -> None:
    """out (n_tok, n_embd) += the experts' weighted sum for x (n_tok, n_embd) f32.

    ids (n_tok, n_used) int32 and weights f32 as route left them; gate and up (n_expert, n_ff_exp, n_embd), down
    (n_expert, n_embd, n_ff_exp)
    """
    n_tok, n_embd = rows_f32("x", x, 2)
    n_used = ids.shape[1]
    n_expert, n_ff, _ = gate.shape
    array("ids", ids, np.int32, 2, (n_tok, n_used))
    rows_f32("weights", weights, 2, (n_tok, n_used))
    rows_f32("out", out, 2, (n_tok, n_embd))
    if gate.shape != (n_expert, n_ff, n_embd) or up.shape != gate.shape or down.shape != (n_expert, n_embd, n_ff):
        raise ValueError(f"experts of shapes {gate.shape}, {up.shape}, {down.shape} for rows of {n_embd}")
    if n_embd % 16:
        raise ValueError(f"rows of {n_embd} values; expected a multiple of 16")
    n_slots = n_tok * n_used
    wide, narrow = 4 * n_slots * n_embd, 4 * n_slots * n_ff
    # the workspace: gate, up and down of all slots, then quantised activations
    memory = run.workspace(
        2 * narrow + wide + _records_nbytes(gate, up, x.shape) + _records_nbytes(down, down, (n_slots, n_ff))
    )
    gated = memory[:narrow].view(np.float32).reshape(n_slots, n_ff)
    upped = memory[narrow : 2 * narrow].view(np.float32).reshape(n_slots, n_ff)
    downed = memory[2 * narrow : 2 * narrow + wide].view(np.float32).reshape(n_slots, n_embd)
    at = 2 * narrow + wide

    kinds = {quants.FORMATS[w.type.id].activation for w in (gate, up)}
    records = quantised(run, kinds, x[:, None, :], at)
    for w, o, barrier in ((gate, gated, False), (up, upped, True)):
        acts, stride, _ = records[quants.FORMATS[w.type.id].activation]
        _slots(run, w, ids, acts, stride, n_used, o, barrier)
    swiglu(run, gated, upped, gated)
    kind = quants.FORMATS[down.type.id].activation
    acts, stride, _ = quantised(run, {kind}, gated[:, None, :], at + _records_nbytes(gate, up, x.shape))[kind]
    _slots(run, down, ids, acts, stride, 1, downed, True)
    run.launch(add_slots(), n_tok, (downed, weights, n_used, out, out.strides[0], n_embd))


def _records_nbytes(a: Any, b: Any, shape: tuple[int, ...]) -> int:
    n, k = shape
    kinds = {quants.FORMATS[w.type.id].activation for w in (a, b)} - {"f32"}
    return sum(-(-quants.record_bytes(kind, k) * n // 64) * 64 for kind in kinds)


def _slots(
    run: Any, w: Any, ids: np.ndarray, acts: np.ndarray, stride: int, slots_per_x: int, out: np.ndarray, barrier: bool
) -> None:
    _, n_rows, k = w.shape
    array("weight", w.data, np.uint8, 3, (*w.shape[:2], quants.row_bytes(w.type.id, k)))
    expert, row = w.data.strides[:2]
    n_block = max(1, TILE_BYTES // row)
    args = (w.data, expert, row, n_rows, n_block, ids, acts, stride, slots_per_x, out, k)
    run.launch(expert_rows(type_id=w.type.id), ids.size * -(-n_rows // n_block), args, barrier)
