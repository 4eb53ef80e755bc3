"""Attention of many query tokens over the K-cache in MHA mode: K and V of every head, expanded from the rows.

    q      (n_tok, n_head, nope + R) f32    query i is at position n_past + i and sees rows 0 … n_past + i
    rows   (n_ctx, row_stride) u8           later rows are never read
    k[t, h] = [ sum_c latent[t, c] · w_uk[h, c] | k_rope[t] ]      v[t, h] = w_uv[h] · latent[t]
    out[i, h] = sum_t softmax(kq_scale · q[i, h] · k[t, h])[t] · v[t, h]

Absorbed attention costs 2·(2C + R) flop per (query, head, row), this one 2·(nope + R + Dv), and 2·C·(nope + Dv) per
(head, row) for the expansion: 2176 against 640 and 262,144 for DeepSeek-V2-Lite, so 170 queries pay for it.

Every product is the microkernel, and every operand is written in the layout in which it is read next:

    product                     lanes (panel)                         broadcast, row by row
    K[t, n]  = latent · w_uk    32 of nope   w_uk, zipped             latent rows
    V'[d, t] = w_uv · latent'   48 rows      latent, transposed       w_uv as the file has it
    S'[t, q] = K · q'           64 queries   q, transposed once       K rows, then the rope rows all heads share
    O'[d, q] = V' · P'          64 queries   softmax of S'            V' rows

Queries are lanes, so the running maximum and sum are vertical arithmetic. Rows come in blocks of KV_TILES tiles: a job
reads the cache, one expands K and V, one lets every (head, block of queries) attend; sums and outputs stay in the
workspace in between, in f32. Heads come in groups, so that the workspace stays below WORKSPACE bytes.

type_k f16 computes in f32; bf16 and q8 multiply in bf16 where the CPU can (ISA.panel), with sums in f32. Rows in q8 are
un-rotated first: latent = γ ⊙ H(int8 · scale).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import quants
from ._jit import f32, kernel
from .attention import LOG2_E, NO_SCORE
from .check import array, rows_f32
from .isa import ISA
from .k_cache import _check, hadamard, widening

ROWS = 96  # of a tile: scores of 64 queries are 24 KiB
KV_TILES = 8  # of a block
ROW_LANES = 48  # rows in a panel of the latent
WEIGHT_ROWS = 32  # decoded by a tile
WORKSPACE = 48 << 20
PAD = 64  # bytes after rows that are broadcast: strides of powers of two fight over the sets of the first cache

N_VEC = 4 if ISA.avx512 else 1  # vectors of queries in a register block
LANES = 16 * N_VEC


def mla_prefill(
    run: Any, q: np.ndarray, rows: np.ndarray, type_k: str, n_past: int, kv_lora_rank: int, n_rot: int, kq_scale: float,
    w_uk: Any, w_uv: Any, norm_weight: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Causal attention of n_tok query tokens over rows 0 … n_past + n_tok - 1, which k_store has written.

    q            (n_tok, n_head, nope + n_rot) f32   [nope | rope], rotated, not absorbed
    rows         (n_ctx, row_stride) u8              laid out as type_k says
    kq_scale     1 / sqrt(nope + n_rot), times mscale² under YaRN
    w_uk, w_uv   weights (n_head, kv_lora_rank, nope), (n_head, Dv, kv_lora_rank) of any type
    norm_weight  (kv_lora_rank,) f32                 of the latent; read for q8 only
    out          (n_tok, n_head, Dv) f32

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1; online softmax as in FlashAttention (arXiv 2205.14135).
    """
    n_head, rank, nope = w_uk.shape
    n_v = w_uv.shape[1]
    n_tok, _, _ = rows_f32("q", q, 3, (q.shape[0], n_head, nope + n_rot))
    rows_f32("out", out, 3, (n_tok, n_head, n_v))
    rows_f32("norm_weight", norm_weight, 1, (kv_lora_rank,))
    _check(rows, type_k, kv_lora_rank, n_rot)
    array("w_uk", w_uk.data, np.uint8, 3, (n_head, kv_lora_rank, quants.row_bytes(w_uk.type.id, nope)))
    array("w_uv", w_uv.data, np.uint8, 3, (n_head, n_v, quants.row_bytes(w_uv.type.id, kv_lora_rank)))
    if nope % 32 or n_rot % 32 or n_v % 32:
        raise ValueError(f"head widths nope {nope}, n_rot {n_rot}, v {n_v}; expected multiples of 32")
    n_kv = n_past + n_tok
    if n_tok < 1 or n_past < 0 or n_kv > rows.shape[0]:
        raise ValueError(f"{n_tok} tokens after {n_past} in a cache of {rows.shape[0]} rows")

    kind = "f32" if type_k == "f16" else ISA.panel
    size = 4 if kind == "f32" else 2
    n_block = -(-n_tok // LANES)
    kv = min(KV_TILES, -(-n_kv // ROWS)) * ROWS
    shared = [kv * (rank * size + PAD), kv * rank * size, kv * n_rot * size]
    per_head = [
        rank * nope * size, n_v * (rank * size + PAD), kv * nope * size, kv * n_v * size,
        n_block * LANES * (nope + n_rot) * size, n_block * LANES * (n_v + 2) * 4,
    ]  # fmt: skip
    n_group = min(n_head, max(1, (WORKSPACE - sum(shared)) // sum(per_head)))
    ends = np.cumsum(shared + [n_group * n for n in per_head])
    latent, panel, rope, uk, uv, keys, values, queries, state, _ = np.split(run.workspace(int(ends[-1])), ends)
    scale = float(kq_scale * LOG2_E)
    for h in range(0, n_head, n_group):
        heads = slice(h, min(h + n_group, n_head))
        n = heads.stop - h
        data, weights = w_uk.data[heads], w_uv.data[heads]
        run.launch(
            decode_weights(type_id=w_uk.type.id, kind=kind, zipped=True), n * (rank // WEIGHT_ROWS),
            (data, *data.strides[:2], rank, nope, uk), barrier=False,
        )  # fmt: skip
        run.launch(
            decode_weights(type_id=w_uv.type.id, kind=kind, zipped=False), n * (n_v // WEIGHT_ROWS),
            (weights, *weights.strides[:2], n_v, rank, uv), barrier=False,
        )  # fmt: skip
        run.launch(
            pack_queries(kind=kind), n * n_block,
            (q[:, heads], *q.strides[:2], n_tok, n_block, nope + n_rot, scale, queries), barrier=False,
        )  # fmt: skip
        for first in range(0, n_kv, kv):
            n_tile = -(-min(kv, n_kv - first) // ROWS)
            run.launch(
                read_rows(type_k=type_k, kind=kind), n_tile,
                (rows[first:], rows.strides[0], n_kv - first, rank, n_rot, norm_weight, latent, panel, rope),
            )  # fmt: skip
            run.launch(
                expand(kind=kind), n * n_tile,
                (latent, panel, uk, uv, keys, values, kv, rank, nope, n_v, n_tile),
            )  # fmt: skip
            run.launch(
                attend(kind=kind), n * n_block,
                (queries, keys, values, rope, state, kv, nope, n_rot, n_v, n_block, first, n_tile, n_past, n_tok),
            )  # fmt: skip
        args = (state, n_tok, n_block, n_v, out[:, heads], *out.strides[:2])
        run.launch(finish(), n * n_block, args)


@kernel
def decode_weights(type_id, kind, zipped):
    """WEIGHT_ROWS rows of a head a tile: to a panel [k / 32][rows / g][32][g] if zipped, else to rows."""
    from .simd import ld, pair_bf16, st, st_bf16, sti

    decode_block, f = quants.block_decoder(type_id), quants.FORMATS[type_id]
    block, nbytes = f.block, f.nbytes
    bf16 = kind == "bf16"
    size = 2 if bf16 else 4

    def body(tile, scratch, w, w_head, w_row, n_rows, k, out):
        tiles = n_rows // WEIGHT_ROWS
        head, first = tile // tiles, tile % tiles * WEIGHT_ROWS
        w += head * w_head + first * w_row
        for r in range(WEIGHT_ROWS):
            for i in range(k // block):
                decode_block(w + r * w_row + i * nbytes, scratch + (r * k + i * block) * 4)
        if not zipped:
            stride = k * size + PAD
            out += (head * n_rows + first) * stride
            for r in range(WEIGHT_ROWS):
                for i in range(0, k, 16):
                    v = ld(scratch + (r * k + i) * 4)
                    if bf16:
                        st_bf16(out + r * stride + 2 * i, v)
                    else:
                        st(out + r * stride + 4 * i, v)
        else:
            out += head * n_rows * k * size
            for i in range(0, k, 16):
                p = out + (i // 32 * n_rows + first) * 32 * size + i % 32 * 4
                x = scratch + 4 * i
                if bf16:
                    for r in range(0, WEIGHT_ROWS, 2):
                        sti(p + r * 64, pair_bf16(ld(x + r * k * 4), ld(x + (r + 1) * k * 4)))
                else:
                    for r in range(WEIGHT_ROWS):
                        st(p + r * 128, ld(x + r * k * 4))

    return body


@kernel
def pack_queries(kind):
    """LANES queries of a head a tile: the panel [width / g][LANES][g], scaled; zeros after n_tok."""
    from .simd import bc, ld, st, st_bf16, transpose16

    bf16 = kind == "bf16"
    size = 2 if bf16 else 4

    def body(tile, scratch, q, q_tok, q_head, n_tok, n_block, width, scale: f32, out):
        head, first = tile // n_block, tile % n_block * LANES
        q += head * q_head
        out += tile * LANES * width * size
        for lane in range(0, LANES, 16):
            for r in range(16):
                t = first + lane + r
                x = q + min(t, n_tok - 1) * q_tok
                factor = bc(scale if t < n_tok else 0.0)
                for i in range(0, width, 16):
                    v = ld(x + 4 * i) * factor
                    if bf16:
                        st_bf16(scratch + (r * width + i) * 2, v)
                    else:
                        st(scratch + (r * width + i) * 4, v)
            for i in range(0, width * size, 64):
                transpose16(scratch + i, width * size, out + i // 4 * LANES * 4 + lane * 4, LANES * 4)

    return body


@kernel
def read_rows(type_k, kind):
    """ROWS cache rows a tile: latent as rows and as panels [C / g][ROW_LANES][g], rope as rows; zeros after n_rows."""
    from .simd import bc, ld, st, st_bf16, transpose16

    widen, transform = widening(type_k), hadamard()
    bf16 = kind == "bf16"
    size = 2 if bf16 else 4

    def body(tile, scratch, rows, row_stride, n_rows, C, R, weight, latent, panel, rope):
        first = tile * ROWS
        stride = C * size + PAD
        latent += first * stride
        panel += first * C * size
        rope += first * R * size
        for t in range(ROWS):
            if first + t < n_rows:
                widen(rows + (first + t) * row_stride, scratch, C, R)
                if type_k == "q8":
                    transform(scratch, C)
                    for i in range(0, C, 16):
                        st(scratch + 4 * i, ld(scratch + 4 * i) * ld(weight + 4 * i))
            else:
                for i in range(0, C + R, 16):
                    st(scratch + 4 * i, bc(0.0))
            for i in range(0, C + R, 16):
                v = ld(scratch + 4 * i)
                to = latent + t * stride + i * size if i < C else rope + (t * R + i - C) * size
                if bf16:
                    st_bf16(to, v)
                else:
                    st(to, v)
        for t in range(0, ROWS, 16):
            p = panel + t // ROW_LANES * ROW_LANES * C * size + t % ROW_LANES * 4
            for i in range(0, C * size, 64):
                transpose16(latent + t * stride + i, stride, p + i // 4 * ROW_LANES * 4, ROW_LANES * 4)

    return body


@kernel
def expand(kind):
    """K [ROWS][nope] and V' [Dv][ROWS] of one head and tile of rows."""
    from .microkernel import rank1_bf16, rank1_f32, store_regs, store_regs_bf16, zeros_f

    bf16 = kind == "bf16"
    size = 2 if bf16 else 4
    rank1 = rank1_bf16 if bf16 else rank1_f32
    store = store_regs_bf16 if bf16 else store_regs
    # Zen 4 as Haswell: 37 % of the f32 peak with (3, 2) and (2, 3), whose panels stream from the second cache; now 79 %
    MK, NK = (12, 2) if ISA.avx512 else (6, 1)  # rows, by vectors of nope
    MV, NV = (8, 3) if ISA.avx512 else (4, 1)  # of Dv, by vectors of rows

    def body(tile, scratch, latent, panel, w_uk, w_uv, keys, values, kv, C, nope, n_v, n_tile):
        head, first = tile // n_tile, tile % n_tile * ROWS
        stride = C * size + PAD
        steps = C * size // 4
        latent += first * stride
        w_uk += head * C * nope * size
        keys += (head * kv + first) * nope * size
        for n in range(0, nope, 16 * NK):
            for t in range(0, ROWS, MK):
                acc = zeros_f(MK, NK)
                w, x = w_uk + n // 32 * 32 * C * size + n % 32 * 4, latent + t * stride
                for _ in range(steps):
                    acc = rank1(acc, w, x, stride)
                    w += 128
                    x += 4
                store(acc, keys + (t * nope + n) * size, nope * size)
        panel += first * C * size
        w_uv += head * n_v * stride
        values += (head * kv + first) * n_v * size
        for t in range(0, ROWS, 16 * NV):
            for d in range(0, n_v, MV):
                acc = zeros_f(MV, NV)
                w, x = panel + t // ROW_LANES * ROW_LANES * C * size + t % ROW_LANES * 4, w_uv + d * stride
                for _ in range(steps):
                    acc = rank1(acc, w, x, stride)
                    w += ROW_LANES * 4
                    x += 4
                store(acc, values + (d * ROWS + t) * size, ROWS * size)

    return body


@kernel
def attend(kind):
    """One head and block of LANES queries, over a block of rows. state: [Dv][LANES] outputs, maximum, sum."""
    from .microkernel import load_regs, mul_regs, rank1_bf16, rank1_f32, store_regs, zeros_f
    from .simd import VI, I, W, bc, bci, instruction, ir, ld, pair_bf16, st, sti, vexp2_down, vmax, where_lt

    bf16 = kind == "bf16"
    size = 2 if bf16 else 4
    rank1 = rank1_bf16 if bf16 else rank1_f32
    ROW = 4 * LANES  # bytes of a step of a panel, and of a row of scores
    MQ = ISA.n_acc // N_VEC
    MD = 4

    @instruction(I)
    def lane_index(b):
        return ir.Constant(VI, list(range(W)))

    def body(
        tile, scratch, queries, keys, values, rope, state, kv, nope, R, n_v, n_block, first, n_tile, n_past, n_tok
    ):
        head, block = tile // n_block, tile % n_block
        position = n_past + block * LANES
        last = min(position + LANES, n_past + n_tok) - 1
        queries += tile * (nope + R) * size * LANES
        state += tile * (n_v + 2) * ROW
        maxima = state + n_v * ROW
        sums = maxima + ROW
        factors = scratch
        scores = scratch + ROW
        probs = scores + ROWS * ROW
        if first == 0:
            for i in range(0, n_v * ROW, 64):
                st(state + i, bc(0.0))
            for i in range(0, ROW, 64):
                st(maxima + i, bc(NO_SCORE))
                st(sums + i, bc(0.0))
        for i in range(n_tile):
            t0 = first + i * ROWS
            if t0 > last:
                break
            k = keys + (head * kv + i * ROWS) * nope * size
            v = values + (head * kv + i * ROWS) * n_v * size
            k_rope = rope + i * ROWS * R * size
            for t in range(0, ROWS, MQ):
                acc = zeros_f(MQ, N_VEC)
                w, x = queries, k + t * nope * size
                for _ in range(nope * size // 4):
                    acc = rank1(acc, w, x, nope * size)
                    w += ROW
                    x += 4
                x = k_rope + t * R * size
                for _ in range(R * size // 4):
                    acc = rank1(acc, w, x, R * size)
                    w += ROW
                    x += 4
                store_regs(acc, scores + t * ROW, ROW)
            if t0 + ROWS - 1 > position:
                for n in range(0, LANES, 16):
                    seen = bci(position + n + 1) + lane_index()
                    for t in range(max(0, position - t0), ROWS):
                        s = scores + t * ROW + 4 * n
                        st(s, where_lt(bci(t0 + t), seen, ld(s), bc(NO_SCORE)))
            for n in range(0, ROW, 64):
                s = scores + n
                old = ld(maxima + n)
                m0 = old
                m1 = old
                for t in range(0, ROWS, 2):
                    m0 = vmax(m0, ld(s + t * ROW))
                    m1 = vmax(m1, ld(s + t * ROW + ROW))
                top = vmax(m0, m1)
                fade = vexp2_down(old - top)
                a0 = ld(sums + n) * fade
                a1 = bc(0.0)
                for t in range(0, ROWS, 2):
                    p0 = vexp2_down(ld(s + t * ROW) - top)
                    p1 = vexp2_down(ld(s + t * ROW + ROW) - top)
                    a0 = a0 + p0
                    a1 = a1 + p1
                    if bf16:
                        sti(probs + t // 2 * ROW + n, pair_bf16(p0, p1))
                    else:
                        st(probs + t * ROW + n, p0)
                        st(probs + t * ROW + ROW + n, p1)
                st(maxima + n, top)
                st(sums + n, a0 + a1)
                st(factors + n, fade)
            for d in range(0, n_v, MD):
                o = state + d * ROW
                acc = mul_regs(load_regs(zeros_f(MD, N_VEC), o, ROW), factors)
                w, x = probs, v + d * ROWS * size
                for _ in range(ROWS * size // 4):
                    acc = rank1(acc, w, x, ROWS * size)
                    w += ROW
                    x += 4
                store_regs(acc, o, ROW)

    return body


@kernel
def finish():
    """One head and block of queries: outputs over sums, from [Dv][LANES] to rows of out."""
    from .simd import bc, ld, ldi, st, sti, transpose16

    def body(tile, scratch, state, n_tok, n_block, n_v, out, out_tok, out_head):
        head, first = tile // n_block, tile % n_block * LANES
        state += tile * (n_v + 2) * 4 * LANES
        out += head * out_head
        for lane in range(0, LANES, 16):
            o = state + 4 * lane
            factor = bc(1.0) / ld(o + (n_v + 1) * 4 * LANES)
            for d in range(n_v):
                st(scratch + 64 * d, ld(o + d * 4 * LANES) * factor)
            for d in range(0, n_v, 16):
                transpose16(scratch + 64 * d, 64, scratch + 64 * n_v, 64)
                for r in range(max(0, min(16, n_tok - first - lane))):
                    sti(out + (first + lane + r) * out_tok + 4 * d, ldi(scratch + 64 * n_v + 64 * r))

    return body
