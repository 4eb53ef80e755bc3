"""Experts: the products with what the router chose.

    out[t] += sum over its slots s of weight[t, s] · down_e(silu(gate_e x) · (up_e x)),  e = ids[t, s]

A slot is a pair (token, choice). Slots are summed in the order of choice.

One token: a slot's products are those of a plain matrix, on rows found through the expert's id, which is read when the
job runs. Few tokens: slots are sorted by expert, and those of one expert share each row of its weights; the bits are
those of one token. More tokens (panels.py): slots are sorted by expert, so that each panel of weights is decoded once
for all the tokens of its expert; gate, up and SwiGLU are one job.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import panels, quants
from ._jit import kernel
from .check import array, rows_f32
from .ffn import silu_times, swiglu
from .matmul import MAX_DOT_TOKENS, SUMS_AT, quantised, rows_times, store_sums, tile_rows
from .panels import MAX_ROWS, PACKED_BYTES, PANEL_BYTES, PANEL_ROWS
from .quants import SUMS_BYTES


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
    if n_embd % 32 or n_ff % 32:
        raise ValueError(f"experts of {n_embd} and {n_ff} values; expected multiples of 32")
    for w in (gate, up, down):
        array("weight", w.data, np.uint8, 3, (*w.shape[:2], quants.row_bytes(w.type.id, w.shape[2])))
    (_few_tokens if n_tok <= MAX_DOT_TOKENS else _many_tokens)(run, x, ids, weights, gate, up, down, out)


def _few_tokens(
    run: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, out: np.ndarray
) -> None:
    (n_tok, n_embd), n_used, (n_expert, n_ff, _) = x.shape, ids.shape[1], gate.shape
    n_slots = n_tok * n_used
    sizes = [
        4 * n_slots * n_ff, 4 * n_slots * n_ff, 4 * n_slots * n_embd, 4 * n_slots, 4 * (n_expert + 1),
        _records_nbytes(gate, up, x.shape), _records_nbytes(down, down, (n_slots, n_ff)),
    ]  # fmt: skip
    ends = np.cumsum([-(-n // 64) * 64 for n in sizes])
    memory = run.workspace(int(ends[-1]))
    gated, upped, downed, order, starts = (
        memory[end - -(-n // 64) * 64 :][:n] for n, end in zip(sizes[:5], ends, strict=False)
    )
    gated, upped = (v.view(np.float32).reshape(n_slots, n_ff) for v in (gated, upped))
    downed = downed.view(np.float32).reshape(n_slots, n_embd)

    kinds = {quants.FORMATS[w.type.id].activation for w in (gate, up)}
    if n_tok > 1:
        run.launch(sort_slots(), 1, (ids, n_slots, n_expert, order, starts), barrier=kinds == {"f32"})
    records = quantised(run, kinds, x[:, None, :], int(ends[4]))
    for w, o, barrier in ((gate, gated, False), (up, upped, True)):
        acts, stride, _ = records[quants.FORMATS[w.type.id].activation]
        _slots(run, w, ids, order, acts, stride, n_used, o, barrier)
    swiglu(run, gated, upped, gated)
    kind = quants.FORMATS[down.type.id].activation
    acts, stride, _ = quantised(run, {kind}, gated[:, None, :], int(ends[5]))[kind]
    _slots(run, down, ids, order, acts, stride, 1, downed, True)
    run.launch(add_slots(), n_tok, (downed, weights, n_used, out, out.strides[0], n_embd))


def _records_nbytes(a: Any, b: Any, shape: tuple[int, ...]) -> int:
    n, k = shape
    kinds = {quants.FORMATS[w.type.id].activation for w in (a, b)} - {"f32"}
    return sum(-(-quants.record_bytes(kind, k) * n // 64) * 64 for kind in kinds)


def _slots(
    run: Any, w: Any, ids: np.ndarray, order: np.ndarray, acts: np.ndarray, stride: int, slots_per_x: int,
    out: np.ndarray, barrier: bool,
) -> None:  # fmt: skip
    _, n_rows, k = w.shape
    expert, row = w.data.strides[:2]
    n_block = tile_rows(run, n_rows, row, ids.size)
    args = (w.data, expert, row, n_rows, n_block, ids, order, ids.size, acts, stride, slots_per_x, out, k)
    code = expert_rows(type_id=w.type.id, several=len(ids) > 1)
    run.launch(code, ids.size * -(-n_rows // n_block), args, barrier)


@kernel
def expert_rows(type_id, several):
    """A tile: n_block rows of one slot's expert, times the activations of its token (or of the slot itself).

    several: order lists the slots by expert; the first slot of an expert takes all of that expert, the others nothing.
    """
    from .simd import ld_i32, st_i64

    multiply, store = rows_times(type_id, several), store_sums(False)

    def body(tile, scratch, w, w_expert, w_row, n_rows, n_block, ids, order, n_slots, x, x_stride, slots_per_x, out, k):
        blocks = (n_rows + n_block - 1) // n_block
        at, first = tile // blocks, tile % blocks * n_block
        if several:
            expert = ld_i32(ids + 4 * ld_i32(order + 4 * at))
            if at > 0 and ld_i32(ids + 4 * ld_i32(order + 4 * at - 4)) == expert:
                return
            slots, n = order + 4 * at, 1
            while at + n < n_slots and ld_i32(ids + 4 * ld_i32(slots + 4 * n)) == expert:
                n += 1
            for i in range((n + 3) // 4 * 4):
                st_i64(scratch + 8 * i, x + ld_i32(slots + 4 * min(i, n - 1)) // slots_per_x * x_stride)
        else:
            expert, n = ld_i32(ids + 4 * at), 1
            st_i64(scratch, x + at // slots_per_x * x_stride)
        w += expert * w_expert + first * w_row
        out += 4 * first
        sums = scratch + SUMS_AT
        n_block = min(n_block, n_rows - first)
        for r in range(0, n_block, 16):
            m = min(16, n_block - r)
            multiply(w + r * w_row, w_row, m, scratch, n, k, sums)
            for i in range(n):
                slot = ld_i32(order + 4 * (at + i)) if several else at
                store(sums + SUMS_BYTES * i, m, out + 4 * (slot * n_rows + r))

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


# ------------------------------------------------------------------------------------------------------ many tokens


def _many_tokens(
    run: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Any, up: Any, down: Any, out: np.ndarray
) -> None:
    (n_tok, n_embd), n_used, (n_expert, n_ff, _) = x.shape, ids.shape[1], gate.shape
    n_slots = n_tok * n_used
    kind, kind_up = (panels.kind_of(w.type.id, n_embd) for w in (gate, up))
    if kind != kind_up:  # one packing serves both
        kind = "f32"
    kind_down = panels.kind_of(down.type.id, n_ff)
    sizes = [
        4 * n_slots, 4 * (n_expert + 1), panels.packed_bytes(kind, n_slots, n_embd), 4 * n_slots * n_ff,
        panels.packed_bytes(kind_down, n_slots, n_ff), 4 * n_slots * n_embd,
    ]  # fmt: skip
    ends = np.cumsum([-(-n // 64) * 64 for n in sizes])
    order, starts, packed, hidden, packed_hidden, downed = np.split(run.workspace(int(ends[-1])), ends[:-1])
    order, starts = order[: sizes[0]].view(np.int32), starts[: sizes[1]].view(np.int32)
    hidden = hidden[: sizes[3]].view(np.float32).reshape(n_slots, n_ff)

    run.launch(sort_slots(), 1, (ids, n_slots, n_expert, order, starts))
    panels.launch_pack(run, kind, x, packed, order, n_used)
    run.launch(
        gate_up(gate_id=gate.type.id, up_id=up.type.id, kind=kind), n_expert * -(-n_ff // PANEL_ROWS),
        (*_strides(gate), *_strides(up), n_ff, n_embd, starts, packed, panels.block_bytes(kind, n_slots), hidden,
         run.n_threads),
    )  # fmt: skip
    panels.launch_pack(run, kind_down, hidden, packed_hidden)
    run.launch(
        expert_down(type_id=down.type.id, kind=kind_down), n_expert * -(-n_embd // PANEL_ROWS),
        (*_strides(down), n_embd, n_ff, starts, order, packed_hidden, panels.block_bytes(kind_down, n_slots), downed,
         run.n_threads),
    )  # fmt: skip
    run.launch(add_slots(), n_tok, (downed, weights, n_used, out, out.strides[0], n_embd))


def _strides(w: Any) -> tuple[np.ndarray, int, int]:
    return w.data, *w.data.strides[:2]


@kernel
def sort_slots():
    """One tile: order lists the slots by expert, those of one expert by token; starts[e] is where expert e begins."""
    from .simd import ld_i32, st_i32

    def body(tile, scratch, ids, n_slots, n_expert, order, starts):
        for e in range(n_expert + 1):
            st_i32(starts + 4 * e, 0)
        for s in range(n_slots):
            at = starts + 4 * ld_i32(ids + 4 * s)
            st_i32(at, ld_i32(at) + 1)
        total = 0
        for e in range(n_expert + 1):
            n = ld_i32(starts + 4 * e)
            st_i32(starts + 4 * e, total)
            st_i32(scratch + 4 * e, total)
            total += n
        for s in range(n_slots):
            at = scratch + 4 * ld_i32(ids + 4 * s)
            i = ld_i32(at)
            st_i32(order + 4 * i, s)
            st_i32(at, i + 1)

    return body


def tile_offset(tile: int, tiles: int, expert: int, row: int) -> int:
    """Bytes from an expert tensor's start to the panel of a tile; beyond the last one for tiles that only prefetch."""
    return tile // tiles * expert + tile % tiles * PANEL_ROWS * row


@kernel
def gate_up(gate_id, up_id, kind):
    """PANEL_ROWS rows of one expert's gate and up a tile, times all its slots: silu(gate) · up, (n_slots, n_ff)."""
    from .simd import device, ld, ld_i32, st

    gate_product, up_product = panels.panel_product(gate_id, kind), panels.panel_product(up_id, kind)
    silu, rows_at = silu_times(), device(tile_offset)
    nbytes = PACKED_BYTES[kind]

    def body(tile, scratch, gate, gate_expert, gate_row, up, up_expert, up_row, n_ff, k, starts, x, x_block, hidden,
             n_threads):  # fmt: skip
        tiles = (n_ff + PANEL_ROWS - 1) // PANEL_ROWS
        expert, first = tile // tiles, tile % tiles * PANEL_ROWS
        rows = min(PANEL_ROWS, n_ff - first)
        start, stop = ld_i32(starts + 4 * expert), ld_i32(starts + 4 * expert + 4)
        gated = scratch + PANEL_BYTES
        upped = gated + MAX_ROWS * PANEL_ROWS * 4
        ahead = gate + rows_at(tile + n_threads, tiles, gate_expert, gate_row)
        gate += rows_at(tile, tiles, gate_expert, gate_row)
        up += rows_at(tile, tiles, up_expert, up_row)
        hidden += 4 * first
        for i in range(start, stop, MAX_ROWS):
            n = min(MAX_ROWS, stop - i)
            source = x + i * nbytes
            gate_product(gate, gate_row, rows, k, source, x_block, n, gated, scratch, up)
            up_product(up, up_row, rows, k, source, x_block, n, upped, scratch, ahead)
            for t in range(n):
                to = hidden + 4 * (i + t) * n_ff
                for r in range(0, rows, 16):
                    at = 4 * (t * PANEL_ROWS + r)
                    st(to + 4 * r, silu(ld(gated + at), ld(upped + at)))

    return body


@kernel
def expert_down(type_id, kind):
    """PANEL_ROWS rows of one expert's down a tile, times all its slots; out is (n_slots, n_embd), by slot again."""
    from .simd import device, ld, ld_i32, st

    product, rows_at = panels.panel_product(type_id, kind), device(tile_offset)
    nbytes = PACKED_BYTES[kind]

    def body(tile, scratch, down, down_expert, down_row, n_embd, k, starts, order, x, x_block, out, n_threads):
        tiles = (n_embd + PANEL_ROWS - 1) // PANEL_ROWS
        expert, first = tile // tiles, tile % tiles * PANEL_ROWS
        rows = min(PANEL_ROWS, n_embd - first)
        sums = scratch + PANEL_BYTES
        ahead = down + rows_at(tile + n_threads, tiles, down_expert, down_row)
        down += rows_at(tile, tiles, down_expert, down_row)
        stop = ld_i32(starts + 4 * expert + 4)
        for i in range(ld_i32(starts + 4 * expert), stop, MAX_ROWS):
            n = min(MAX_ROWS, stop - i)
            product(down, down_row, rows, k, x + i * nbytes, x_block, n, sums, scratch, ahead)
            for t in range(n):
                to = out + (ld_i32(order + 4 * (i + t)) * n_embd + first) * 4
                for r in range(0, rows, 16):
                    st(to + 4 * r, ld(sums + 4 * (t * PANEL_ROWS + r)))

    return body
