"""Attention of a few query tokens over the K-cache in MQA mode: V is the latent part of K.

    q      (n_tok, n_head, C + R) f32     absorbed queries
    rows   (n_ctx, row_stride) u8         C + R values of a token; rows >= n_kv are never read
    s[l, t] = kq_scale · q[l] · row[t]    l: (token, head), t < n_kv[token of l]
    out[l]  = sum_t softmax(s[l])[t] · row[t][:C]

Lanes are the pairs l, sixteen to a register, so softmax and rescaling are plain vertical arithmetic, and a lane's
result does not depend on its neighbours. A tile is a split of n_kv; 96 rows at a time are widened to f32 once, in L2,
and serve scores and values of all lanes: each row comes from memory once. Splits have a fixed length and are merged in
order.

All products are f32 here, for every type_k.
"""

from typing import Any

import numpy as np

from ._jit import f32, kernel
from .check import array, rows_f32
from .isa import ISA
from .k_cache import _check

ROWS = 96  # widened together; 96 * 576 * 4 bytes = 216 KiB
SPLIT = 5 * ROWS  # tokens of a split, as long as n_ctx needs no more than MAX_SPLITS of them
MAX_SPLITS = 128
MAX_TOKENS = 16
NO_SCORE = -1e30
LOG2_E = 1.4426950408889634


@kernel
def pack_queries():
    """One group of 16 lanes a tile: its panel [C + R][16], scaled, and its limits; tile 0 counts the splits."""
    from .simd import ld_i32, ld_scalar, st_i32, st_i64, st_scalar

    def body(tile, scratch, q, q_tok, q_head, n_head, n_lanes, width, n_kv, n_tok, scale: f32,
             panels, limits, split, n_splits):  # fmt: skip
        if tile == 0:
            longest = 0
            for t in range(n_tok):
                longest = max(longest, ld_i32(n_kv + 4 * t))
            st_i64(n_splits, (longest + split - 1) // split)
        panel = panels + tile * width * 64
        for lane in range(16):
            pair = tile * 16 + lane
            inside = pair < n_lanes
            token, head = pair // n_head, pair % n_head
            st_i32(limits + 4 * pair, ld_i32(n_kv + 4 * token) if inside else 0)
            x = q + token * q_tok + head * q_head
            for i in range(width):
                st_scalar(panel + 64 * i + 4 * lane, ld_scalar(x + 4 * i) * scale if inside else 0.0)

    return body


def widening(type_k: str) -> Any:
    """A device function (row, out, C, R): a cache row -> C + R f32. For kernel factories."""
    from .simd import bc, device, ld_bf16, ld_f16, ld_scalar, ld_u8_16, st

    @device
    def widen(row, out, C, R):
        if type_k == "q8":
            scale = bc(ld_scalar(row + C + 2 * R))
            for i in range(0, C, 16):
                st(out + 4 * i, (ld_u8_16(row + i) - bc(128.0)) * scale)
            for i in range(0, R, 16):
                st(out + 4 * (C + i), ld_bf16(row + C + 2 * i))
        else:
            for i in range(0, C + R, 16):
                st(out + 4 * i, ld_f16(row + 2 * i) if type_k == "f16" else ld_bf16(row + 2 * i))

    return widen


@kernel
def decode_split(type_k, wide):
    """One split a tile. wide: register blocks for 32 vector registers of 512 bits."""
    from .microkernel import load_regs, mul_rows, rank1_f32, store_regs, zeros_f
    from .simd import bc, bci, ld, ld_i32, ldi, st, vexp2_down, vmax, where_lt

    widen = widening(type_k)
    MQ = 24 if wide else 6  # rows in a block of scores
    MH = 8 if wide else 2  # lanes in a block of outputs, which is two vectors of dimensions wide

    def body(tile, scratch, panels, limits, n_groups, rows, row_stride, C, R, split, partial, n_kv, n_tok):
        width = C + R
        wide_rows = scratch
        scores = wide_rows + ROWS * width * 4
        factors = scores + ROWS * 64
        last = 0
        for t in range(n_tok):
            last = max(last, ld_i32(n_kv + 4 * t))
        first = tile * split
        last = min(last, first + split)
        partial += tile * n_groups * 64 * (C + 2)
        for g in range(n_groups):
            o = partial + g * 64 * (C + 2)
            for i in range(C):
                st(o + 64 * i, bc(0.0))
            st(o + 64 * C, bc(NO_SCORE))
            st(o + 64 * C + 64, bc(0.0))
        for t0 in range(first, last, ROWS):
            n = min(ROWS, last - t0)
            for t in range(n):
                widen(rows + (t0 + t) * row_stride, wide_rows + t * width * 4, C, R)
            for i in range(n * width, ROWS * width, 16):
                st(wide_rows + 4 * i, bc(0.0))
            for g in range(n_groups):
                o = partial + g * 64 * (C + 2)
                ml = o + 64 * C
                for t in range(0, ROWS, MQ):
                    acc = zeros_f(MQ, 1)
                    w, x = panels + g * width * 64, wide_rows + t * width * 4
                    for _ in range(width):
                        acc = rank1_f32(acc, w, x, width * 4)
                        w += 64
                        x += 4
                    store_regs(acc, scores + t * 64, 64)
                limit = ldi(limits + 64 * g)
                old = ld(ml)
                top = old
                for t in range(n):
                    top = vmax(top, where_lt(bci(t0 + t), limit, ld(scores + 64 * t), bc(NO_SCORE)))
                fade = vexp2_down(old - top)
                total = ld(ml + 64) * fade
                for t in range(n):
                    p = where_lt(bci(t0 + t), limit, vexp2_down(ld(scores + 64 * t) - top), bc(0.0))
                    total = total + p
                    st(scores + 64 * t, p)
                st(ml, top)
                st(ml + 64, total)
                st(factors, fade)
                for d in range(0, C, 32):
                    for h in range(0, 16, MH):
                        to = o + (h * C + d) * 4
                        acc = mul_rows(load_regs(zeros_f(MH, 2), to, C * 4), factors + 4 * h)
                        w, x = wide_rows + 4 * d, scores + 4 * h
                        for _ in range(n):
                            acc = rank1_f32(acc, w, x, 4)
                            w += width * 4
                            x += 64
                        store_regs(acc, to, C * 4)

    return body


@kernel
def merge_splits():
    """One lane a tile."""
    from .simd import bc, fma, ld, ld_i64, ld_scalar, st, vexp2_down

    def body(tile, scratch, partial, n_groups, n_splits, C, out, out_tok, out_head, n_head):
        group, lane = tile // 16, tile % 16
        out += tile // n_head * out_tok + tile % n_head * out_head
        size = 64 * (C + 2)
        n = ld_i64(n_splits)
        top = NO_SCORE
        for s in range(n):
            top = max(top, ld_scalar(partial + (s * n_groups + group) * size + 64 * C + 4 * lane))
        total = bc(0.0)
        for i in range(0, C, 16):
            st(out + 4 * i, bc(0.0))
        for s in range(n):
            o = partial + (s * n_groups + group) * size
            weight = vexp2_down(bc(ld_scalar(o + 64 * C + 4 * lane)) - bc(top))
            total = fma(weight, bc(ld_scalar(o + 64 * C + 64 + 4 * lane)), total)
            for i in range(0, C, 16):
                st(out + 4 * i, fma(weight, ld(o + 4 * (lane * C + i)), ld(out + 4 * i)))
        if top > NO_SCORE:  # else the token sees no row, though another of its batch does
            for i in range(0, C, 16):
                st(out + 4 * i, ld(out + 4 * i) / total)

    return body


def mla_decode(
    run: Any, q: np.ndarray, rows: np.ndarray, type_k: str, n_kv: np.ndarray, kv_lora_rank: int, n_rot: int,
    kq_scale: float, out: np.ndarray,
) -> None:  # fmt: skip
    """Attention of 1 to 16 query tokens over the K-cache in MQA mode.

    q         (n_tok, n_head, kv_lora_rank + n_rot) f32   absorbed; for q8 after rotate_query
    rows      (n_ctx, row_stride) u8                      laid out as type_k says
    n_kv      (n_tok,) int32                              rows that each token sees; at most n_ctx
    kq_scale  1 / sqrt(head width before absorption), times mscale² under YaRN
    out       (n_tok, n_head, kv_lora_rank) f32           zeros where n_kv is 0; for q8 before unrotate_output

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1; splits as in Flash-Decoding.
    """
    width = kv_lora_rank + n_rot
    n_tok, n_head, _ = rows_f32("q", q, 3, (q.shape[0], q.shape[1], width))
    rows_f32("out", out, 3, (n_tok, n_head, kv_lora_rank))
    array("n_kv", n_kv, np.int32, 1, (n_tok,))
    _check(rows, type_k, kv_lora_rank, n_rot)
    if not 1 <= n_tok <= MAX_TOKENS:
        raise ValueError(f"{n_tok} query tokens; expected 1 to {MAX_TOKENS}")
    n_groups = -(-n_tok * n_head // 16)
    split = SPLIT * -(-rows.shape[0] // (SPLIT * MAX_SPLITS))
    sizes = [
        n_groups * width * 64,
        n_groups * 64,
        -(-rows.shape[0] // split) * n_groups * 64 * (kv_lora_rank + 2),
    ]
    ends = np.cumsum(sizes)
    memory = run.workspace(int(ends[-1]))
    panels, limits, partial = np.split(memory, ends[:-1])
    n_splits = np.zeros(1, np.int64)  # not in the workspace: see Run.launch
    scale = float(kq_scale * LOG2_E)
    run.launch(
        pack_queries(), n_groups,
        (q, *q.strides[:2], n_head, n_tok * n_head, width, n_kv, n_tok, scale, panels, limits, split, n_splits),
    )  # fmt: skip
    run.launch(
        decode_split(type_k=type_k, wide=ISA.avx512), n_splits,
        (panels, limits, n_groups, rows, rows.strides[0], kv_lora_rank, n_rot, split, partial, n_kv, n_tok),
    )  # fmt: skip
    args = (partial, n_groups, n_splits, kv_lora_rank, out, *out.strides[:2], n_head)
    run.launch(merge_splits(), n_tok * n_head, args)
