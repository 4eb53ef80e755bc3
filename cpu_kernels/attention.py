"""Attention of a few query tokens over the K-cache in MQA mode: V is the latent part of K.

    q      (n_tok, n_head, C + R) f32     absorbed queries
    rows   (n_ctx, row_stride) u8         C + R values of a token; rows >= n_kv are never read
    s[l, t] = kq_scale · q[l] · row[t]    l: (token, head), t < n_kv[token of l]
    out[l]  = sum_t softmax(s[l])[t] · row[t][:C]

Lanes are the pairs l, sixteen to a register (a group), so softmax and rescaling are plain vertical arithmetic, and a
lane's result does not depend on its neighbours. Rows are taken 96 at a time, which serve scores and values of all
groups: each row comes from memory once, and is prefetched while the ones before it are multiplied. This file is the
frame; what differs by the kind of product has a file of its own:

    type_k   kind   products                                                          file
    f16      f32    f32, of rows that are widened once                                decode_f32.py
    bf16     bf16   bf16 pairs, of rows where they lie                                decode_bf16.py
    q8       int8   int8 fours (rope: bf16 pairs), of rows where they lie             decode_int8.py

A CPU without the dot product of a kind takes f32: to emulate bf16 costs more than to widen the rows once. Bytes do pay
with AVX2, whose sums of pairs have 16 bits, for queries of 7 bits (decode_int8.py).

The cache is cut into splits, whose bounds are fixed and whose results are merged in order: the same bits for any number
of threads and any companions in a step. Splits grow with their position, 5 for 500 tokens, 35 for 16k, 115 for 160k:
short contexts occupy all threads, long ones do not spend their time on merging. What splits leave is pushed out of the
caches by the weights of a step, so outputs are bf16 (for f16 f32), and merging prefetches them. DeepSeek-V2-Lite, q8,
two threads of Zen 4 in turns with f32: splits 9 % faster at 4k and 3 % at 16k, merging 1.5 and 1.6 times. 13 splits for
17 at 4k, 26 for 35 at 16k, gain as much, but 8 threads would wait for each other at 2k.

Zen 4 at 3.6 GHz (a zmm dot a cycle), 16 heads, one thread, n_kv 16,384, share of the peak of their products (of q8 of
int8, though its rope part is bf16, half as fast):

              f16   bf16   q8      softmax takes 13 cycles a row of 16 heads, the products of 128 + 32 in bf16 144
    512 + 64  85 %  88 %   70 %    all in f32, as at first: 414, 414, 388 ns a row; now 372, 178, 115
    256 + 64  84    83     62
    128 + 32  80    76     59

The next rows are prefetched beside scores (two thirds) and values (the rest): a core has places for some 24 lines under
way, and beside the scores alone q8 asks for more than that. All beside scores -> so, ns a row of q8, 16 heads, one
thread: 512 + 64 104.9 -> 97.7, 256 + 64 60.4 -> 59.1, 128 + 32 35.6 -> 30.9; bf16 the same, 128 + 32 51.8 -> 50.1. All
beside values lost 6 %; tiles of 192 rows lost 6 % at 128 + 32 and gained 1 % at 512 + 64, tiles of 384 lost 3 %.

Tried: to fetch the weights of the next products as well, for memory idles half the time. A step of DeepSeek-V2-Lite at
4k was 2 % slower to 4 % faster, at 16k 4 to 2: a third cache with other tenants forgets them within milliseconds.
"""

from typing import Any

import numpy as np

from . import decode_bf16, decode_f32, decode_int8
from ._jit import f32, kernel
from .check import array, rows_f32
from .isa import ISA
from .k_cache import _check, widening

KINDS: dict[str, Any] = {"f32": decode_f32, "bf16": decode_bf16, "int8": decode_int8}  # the same functions in each
ROWS = 96  # taken at a time: 216 KiB when widened, at 512 + 64
BLOCK = 24  # the last rows are filled up with zeros to a multiple of it
GROUPS = 4  # of a tile; more make further tiles, which read the rows again
MAX_TOKENS = 16
NO_SCORE = -1e30
LOG2_E = 1.4426950408889634


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
    n_tok, n_head, _ = rows_f32("q", q, 3, (q.shape[0], q.shape[1], kv_lora_rank + n_rot))
    rows_f32("out", out, 3, (n_tok, n_head, kv_lora_rank))
    array("n_kv", n_kv, np.int32, 1, (n_tok,))
    _check(rows, type_k, kv_lora_rank, n_rot)
    if not 1 <= n_tok <= MAX_TOKENS:
        raise ValueError(f"{n_tok} query tokens; expected 1 to {MAX_TOKENS}")
    kind = products(type_k)
    n_lanes = n_tok * n_head
    n_groups = -(-n_lanes // 16)
    n_chunks = -(-n_groups // GROUPS)
    max_splits = next(s for s in range(rows.shape[0] + 1) if rows_before(s) >= rows.shape[0])
    panel = KINDS[kind].panel_bytes(kv_lora_rank, n_rot)
    n_out = KINDS[kind].n_out(kv_lora_rank)
    of_split = split_bytes(16 * n_groups, n_out, output_bytes(kind))
    ends = np.cumsum([n_groups * panel, n_groups * 64, max_splits * of_split])
    memory = run.workspace(int(ends[-1]))
    panels, limits, partial = np.split(memory, ends[:-1])
    n_tiles = np.zeros(1, np.int64)  # not in the workspace: see Run.launch
    scale = float(kq_scale * LOG2_E)
    run.launch(
        pack_queries(kind=kind), n_groups,
        (q, *q.strides[:2], n_head, n_lanes, kv_lora_rank, n_rot, n_kv, n_tok, scale, panels, panel, limits,
         n_chunks, n_tiles),
    )  # fmt: skip
    run.launch(
        decode_split(type_k=type_k, kind=kind), n_tiles,
        (panels, panel, limits, n_lanes, rows, rows.strides[0], kv_lora_rank, n_rot, n_out, partial, n_kv, n_tok,
         n_chunks, n_tiles, run.n_threads),
    )  # fmt: skip
    run.launch(
        merge_splits(kind=kind), n_lanes,
        (partial, n_groups * 16, n_chunks, n_tiles, kv_lora_rank, n_out, out, *out.strides[:2], n_head),
    )  # fmt: skip


def products(type_k: str) -> str:
    """The kind of product that this CPU decodes a type in."""
    if type_k == "bf16" and ISA.bf16:
        return "bf16"
    if type_k == "q8" and (ISA.int8 or ISA.avx2):
        return "int8"
    return "f32"


def output_bytes(kind: str) -> int:
    """Of an output of a split: f32, or bf16 where products are no more exact."""
    return 4 if kind == "f32" else 2


def split_bytes(lanes: int, n_out: int, size: int) -> int:
    """Of a split's results: of all lanes the outputs, then the maxima, then the sums of probabilities."""
    return lanes * (n_out * size + 8)


def rows_before(split: int) -> int:
    """Rows before a split: the first four have ROWS rows each, the next four twice as many, and so on."""
    return ROWS * (split // 4 + 1) * (split // 4 * 2 + split % 4)


@kernel
def pack_queries(kind):
    """One group of 16 lanes a tile: its panel, scaled, and its limits; tile 0 counts the tiles of decode_split."""
    from .simd import bci, device, ld_i32, st_i32, st_i64, sti, transpose16

    pack, padded_row = KINDS[kind].packing(), device(KINDS[kind].padded_row)
    before = device(rows_before)

    def body(tile, scratch, q, q_tok, q_head, n_head, n_lanes, C, R, n_kv, n_tok, scale: f32,
             panels, panel_bytes, limits, n_chunks, n_tiles):  # fmt: skip
        if tile == 0:
            longest = 0
            for t in range(n_tok):
                longest = max(longest, ld_i32(n_kv + 4 * t))
            n_splits = 0
            while before(n_splits) < longest:
                n_splits += 1
            st_i64(n_tiles, n_splits * n_chunks)
        panel = panels + tile * panel_bytes
        size = padded_row(C, R)
        for i in range(16 * size, panel_bytes, 64):
            sti(panel + i, bci(0))
        for lane in range(16):
            pair = tile * 16 + lane
            row = scratch + lane * size
            if pair < n_lanes:
                token, head = pair // n_head, pair % n_head
                st_i32(limits + 4 * pair, ld_i32(n_kv + 4 * token))
                pack(q + token * q_tok + head * q_head, scale, row, panel + 16 * size + 4 * lane, C, R)
            else:
                st_i32(limits + 4 * pair, 0)
                for i in range(0, size, 64):
                    sti(row + i, bci(0))
        for i in range(0, size, 64):
            transpose16(scratch + i, size, panel + 16 * i, 64)

    return body


@kernel
def decode_split(type_k, kind):
    """A split for up to GROUPS groups a tile; the last and longest split comes first."""
    from .simd import bc, device, ld, ld_i32, ld_i64, prefetch, st, st_bf16

    module, size = KINDS[kind], output_bytes(kind)
    keep = st if size == 4 else st_bf16
    read, before, of_split = reading(type_k, kind), device(rows_before), device(split_bytes)
    add_scores, hide, soften, add_values = module.scores(), masking(), softmax(kind), module.values()

    def body(tile, scratch, panels, panel_bytes, limits, n_lanes, rows, row_stride, C, R, n_out, partial, n_kv, n_tok,
             n_chunks, n_tiles, n_threads):  # fmt: skip
        last_split = ld_i64(n_tiles) // n_chunks - 1
        split = last_split - tile // n_chunks
        first_lane = tile % n_chunks * GROUPS * 16
        n_here = min(n_lanes - first_lane, GROUPS * 16)
        n_groups = (n_here + 15) // 16
        last, shortest = 0, 1 << 40
        for t in range(n_tok):
            last = max(last, ld_i32(n_kv + 4 * t))
            shortest = min(shortest, ld_i32(n_kv + 4 * t))
        first = before(split)
        last = min(last, before(split + 1))
        next_first = before(max(0, last_split - (tile + n_threads) // n_chunks))  # a guess; only prefetches follow it
        for i in range(0, BLOCK * row_stride, 64):  # the guess may have been wrong
            prefetch(rows + first * row_stride + i)

        lanes = (n_lanes + 15) // 16 * 16
        partial += split * of_split(lanes, n_out, size)
        result = partial + first_lane * n_out * size
        maxima = partial + lanes * n_out * size + first_lane * 4
        sums = maxima + 4 * lanes
        panels += first_lane // 16 * panel_bytes
        limits += 4 * first_lane
        for i in range(0, n_groups * 64, 64):
            st(maxima + i, bc(NO_SCORE))
            st(sums + i, bc(0.0))

        fades = scratch
        units = fades + GROUPS * 64
        weights = units + GROUPS * 64
        zipped = weights + GROUPS * ROWS * 64
        out = zipped + ROWS * 64  # not where they end up: those lines are another core's, who merged them last
        copy = out + n_groups * n_out * 64
        for i in range(0, n_groups * n_out * 64, 64):
            st(out + i, bc(0.0))
        stride = (C + R) * 4 if kind == "f32" else row_stride
        fetch = in_scores = ROWS * row_stride
        if kind != "f32" and n_here > 8:  # else the values of a tile have too few products to fetch beside
            in_scores = fetch // 3 * 2
        for t0 in range(first, last, ROWS):
            n = min(ROWS, last - t0)
            whole = (n + BLOCK - 1) // BLOCK * BLOCK
            ahead = rows + (t0 + ROWS if t0 + ROWS < last else next_first) * row_stride
            x = read(rows + t0 * row_stride, row_stride, n, whole, copy, C, R)
            for g in range(n_groups):
                p, at = weights + g * ROWS * 64, 64 * g
                add_scores(panels + g * panel_bytes, x, stride, whole, ahead, in_scores // n_groups, p, C, R)
                ahead += in_scores // n_groups
                if t0 + whole > shortest:
                    hide(p, whole, t0, limits + at)
                soften(p, x, stride, whole, maxima + at, sums + at, fades + at, units + at, C, R)
            rest = fetch - in_scores
            add_values(weights, ROWS * 64, n_here, fades, units, x, stride, whole, ahead, rest, zipped, out, C)
        for i in range(0, n_groups * n_out * 16, 16):
            keep(result + size * i, ld(out + 4 * i))

    return body


def reading(type_k: str, kind: str) -> Any:
    """A device function (rows, row_stride, n, whole, copy, C, R): address of `whole` rows, zeros from n on."""
    from .simd import bci, device, ld_i32, ldi, st_i32, sti

    widen = widening(type_k)

    @device
    def read(rows, row_stride, n, whole, copy, C, R):
        if kind == "f32":
            size = (C + R) * 4
            for t in range(n):
                widen(rows + t * row_stride, copy + t * size, C, R)
        else:
            if n == whole:
                return rows
            size = row_stride
            end = n * size // 64 * 64
            for i in range(0, end, 64):
                sti(copy + i, ldi(rows + i))
            for i in range(end, n * size, 4):
                st_i32(copy + i, ld_i32(rows + i))
        for i in range(n * size, whole * size, 64):
            sti(copy + i, bci(0))
        return copy

    return read


def masking() -> Any:
    """A device function: scores [n][16] of rows from t0 on become NO_SCORE's double where a lane does not see the row.

    So their probability is 0 even where NO_SCORE is the maximum.
    """
    from .simd import bc, bci, device, ld, ldi, st, where_lt

    @device
    def hide(p, n, t0, limits):
        for t in range(n):
            st(p + 64 * t, where_lt(bci(t0 + t), ldi(limits), ld(p + 64 * t), bc(2 * NO_SCORE)))

    return hide


def softmax(kind: str) -> Any:
    """A device function: scores [n][16] of the rows at x become weights of their values, in place.

    maxima, sums, fades, units: of 16 lanes. fades: by which sums and outputs so far are multiplied.
    """
    from .simd import device, ld, st, vexp2_down, vmax

    weigh = KINDS[kind].weights()

    @device
    def soften(p, x, stride, n, maxima, sums, fades, units, C, R):
        old = ld(maxima)
        m0 = old
        m1 = old
        for t in range(0, n, 2):
            m0 = vmax(m0, ld(p + 64 * t))
            m1 = vmax(m1, ld(p + 64 * t + 64))
        top = vmax(m0, m1)
        fade = vexp2_down(old - top)
        st(sums, weigh(p, top, ld(sums) * fade, x, stride, n, units, C, R))
        st(maxima, top)
        st(fades, fade)

    return soften


@kernel
def merge_splits(kind):
    """One lane a tile."""
    from .simd import bc, device, fma, ld, ld_bf16, ld_i64, ld_scalar, prefetch, st, vexp2_down

    order, size, of_split = KINDS[kind].order(), output_bytes(kind), device(split_bytes)
    get = ld if size == 4 else ld_bf16

    def body(tile, scratch, partial, lanes, n_chunks, n_tiles, C, n_out, out, out_tok, out_head, n_head):
        out += tile // n_head * out_tok + tile % n_head * out_head
        n_splits = ld_i64(n_tiles) // n_chunks
        step = of_split(lanes, n_out, size)
        x = partial + tile * n_out * size
        maxima = partial + lanes * n_out * size + tile * 4
        sums = maxima + 4 * lanes
        top = NO_SCORE
        for s in range(n_splits):
            top = max(top, ld_scalar(maxima + s * step))
        total = bc(0.0)
        for i in range(0, n_out, 16):
            st(scratch + 4 * i, bc(0.0))
        for s in range(n_splits):
            weight = vexp2_down(bc(ld_scalar(maxima + s * step)) - bc(top))
            total = fma(weight, bc(ld_scalar(sums + s * step)), total)
            for i in range(0, n_out, 16):
                prefetch(x + step + size * i)
                st(scratch + 4 * i, fma(weight, get(x + size * i), ld(scratch + 4 * i)))
            x += step
        factor = bc(0.0)
        if top > NO_SCORE:  # else the token sees no row, though another of its batch may
            factor = bc(1.0) / total
        order(scratch, n_out)
        for i in range(0, 4 * C, 64):
            st(out + i, ld(scratch + i) * factor)

    return body
