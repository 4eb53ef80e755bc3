"""Products of quantised weights and rows of activations, straight from the file's bytes.

    out[t, b, r] (+)= weight[b, r] · x[t, b]          b: head (1 for a plain matrix), r: row, t: token

Up to MAX_DOT_TOKENS tokens: a tile is a block of weight rows of one head; 16 rows at a time are multiplied with up to
four tokens, each row unpacked once for these, and then out of the cache with the next four. The arithmetic of a row is
that of quants.row_sums whatever the number of tokens, so a row in a batch has the bits of a row alone. Activations are
quantised once for all weights that share them.

Zen 4, one thread, weights of 2,048 columns in the second cache, eight tokens, GB/s of weights when every token unpacked
them -> now: Q4_K 2.7 -> 5.1, Q6_K 3.9 -> 7.3, Q8_0 4.7 -> 7.4, F16 5.5 -> 7.2. A step of eight of DeepSeek-V2-Lite
(moe.py shares experts' weights as well) takes half the time, on a busy machine: 1.51 -> 0.76 s.

More tokens: panels.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import panels, quants
from ._jit import kernel
from .check import array, rows_f32
from .isa import ISA
from .quants import SUMS_BYTES

MAX_TILE_BYTES = 256 << 10  # of weights: some ten microseconds of work
TILES_PER_THREAD = 8  # at least, so that threads finish together
MAX_DOT_TOKENS = 16  # so many have the bits of one
SUMS_AT = 8 << 10  # in a thread's scratch, after the addresses of activations


@kernel
def dot_rows(type_id, accumulate, several):
    """A tile: n_block rows of one head, times all tokens; several: whether there may be more than one."""
    from .simd import st_i64

    multiply, store = rows_times(type_id, several), store_sums(accumulate)

    def body(tile, scratch, w, w_head, w_row, n_rows, n_block, x, x_tok, x_head, out, out_tok, out_head, n_tok, k):
        blocks = (n_rows + n_block - 1) // n_block
        head, first = tile // blocks, tile % blocks * n_block
        w += head * w_head + first * w_row
        x += head * x_head
        out += head * out_head + 4 * first
        for t in range((n_tok + 3) // 4 * 4):
            st_i64(scratch + 8 * t, x + min(t, n_tok - 1) * x_tok)
        sums = scratch + SUMS_AT
        n = min(n_block, n_rows - first)
        for r in range(0, n, 16):
            m = min(16, n - r)
            multiply(w + r * w_row, w_row, m, scratch, n_tok, k, sums)
            for t in range(n_tok):
                store(sums + SUMS_BYTES * t, m, out + t * out_tok + 4 * r)

    return body


@functools.cache
def rows_times(type_id: int, several: bool) -> Any:
    """A device function (w, w_row, m, xs, n, k, sums): quants.row_sums of n activation rows; not several: n is 1.

    Four at a time (two where there are not 32 vector registers of 64 bytes), then two or one. Three are taken as four,
    so xs has to hold a multiple of four addresses, and sums to have room for as many.
    """
    from .simd import device

    one = quants.row_sums(type_id, 1)

    @device
    def times_one(w, w_row, m, xs, n, k, sums):
        one(w, w_row, m, xs, k, sums)

    if not several:
        return times_one
    at_once = 4 if ISA.avx512 else 2
    two, most = quants.row_sums(type_id, 2), quants.row_sums(type_id, at_once)

    @device
    def times_several(w, w_row, m, xs, n, k, sums):
        while n > at_once // 2:
            most(w, w_row, m, xs, k, sums)
            xs += 8 * at_once
            sums += at_once * SUMS_BYTES
            n -= at_once
        if n == 2:
            two(w, w_row, m, xs, k, sums)
        elif n == 1:
            one(w, w_row, m, xs, k, sums)

    return times_several


@functools.cache
def store_sums(accumulate: bool) -> Any:
    """A device function (sums, m, out): to (or onto) m <= 16 floats at out the sums of as many vectors of 16."""
    from .quants.row_dots import sums_of_16
    from .simd import device, ld, ld_scalar, st, st_scalar

    @device
    def store(sums, m, out):
        total = sums_of_16(sums)
        if m == 16:
            if accumulate:
                total = total + ld(out)
            st(out, total)
        else:
            st(sums, total)
            for i in range(m):
                value = ld_scalar(sums + 4 * i)
                if accumulate:
                    value += ld_scalar(out + 4 * i)
                st_scalar(out + 4 * i, value)

    return store


def matmul(
    run: Any,
    weight: Any | Sequence[Any],
    x: np.ndarray,
    out: np.ndarray | Sequence[np.ndarray],
    accumulate: bool = False,
) -> None:
    """out (n_tok, m) = x (n_tok, k) @ weight (m, k).T, all f32 but the weight; added to out if accumulate.

    weight and out may be lists: several matrices of the same x.
    """
    weights = list(weight) if isinstance(weight, list | tuple) else [weight]
    outs = list(out) if isinstance(out, list | tuple) else [out]
    rows_f32("x", x, 2)
    for w, o in zip(weights, outs):
        rows_f32("out", o, 2, (x.shape[0], w.shape[0]))
    if len(x) <= MAX_DOT_TOKENS:
        jobs = [(w, w.data[None], o[:, None, :]) for w, o in zip(weights, outs)]
        _products(run, jobs, x[:, None, :], accumulate)
    else:
        _panels(run, weights, x, outs, accumulate)


def _panels(run: Any, weights: list[Any], x: np.ndarray, outs: list[np.ndarray], accumulate: bool) -> None:
    n_tok, k = x.shape
    if k % 32:
        raise ValueError(f"rows of {k} values; expected a multiple of 32")
    kinds = sorted({panels.kind_of(w.type.id, k) for w in weights})
    ends = np.cumsum([-(-panels.packed_bytes(kind, n_tok, k) // 64) * 64 for kind in kinds])
    packed = dict(zip(kinds, np.split(run.workspace(int(ends[-1])), ends[:-1])))
    for kind, memory in packed.items():
        panels.launch_pack(run, kind, x, memory)
    for i, (w, out) in enumerate(zip(weights, outs)):
        array("weight", w.data, np.uint8, 2, (w.shape[0], quants.row_bytes(w.type.id, k)))
        memory = packed[panels.kind_of(w.type.id, k)]
        panels.launch_multiply(run, w, x, memory, out, accumulate, barrier=i == len(weights) - 1)


def matmul_heads(run: Any, weight: Any, x: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, n_head, m) = weight (n_head, m, k) times x (n_tok, n_head, k), head by head."""
    n_head, m, k = weight.shape
    rows_f32("x", x, 3, (x.shape[0], n_head, k))
    rows_f32("out", out, 3, (x.shape[0], n_head, m))
    _products(run, [(weight, weight.data, out)], x, False)


def _products(run: Any, jobs: list[tuple[Any, np.ndarray, np.ndarray]], x: np.ndarray, accumulate: bool) -> None:
    """jobs: (weight, its bytes (n_head, m, row bytes), out (n_tok, n_head, m)); x (n_tok, n_head, k)."""
    n_tok, n_head, k = x.shape
    formats = [quants.FORMATS[w.type.id] for w, _, _ in jobs]
    records = quantised(run, {f.activation for f in formats}, x)
    for i, ((w, data, out), f) in enumerate(zip(jobs, formats)):
        array("weight", data, np.uint8, 3, (n_head, w.shape[-2], quants.row_bytes(w.type.id, k)))
        acts, tok, head = records[f.activation]
        m, row = w.shape[-2], data.strides[-2]
        n_block = tile_rows(run, m, row, n_head)
        args = (data, data.strides[0], row, m, n_block, acts, tok, head, out, *out.strides[:2], n_tok, k)
        code = dot_rows(type_id=w.type.id, accumulate=accumulate, several=n_tok > 1)
        run.launch(code, n_head * -(-m // n_block), args, barrier=i == len(jobs) - 1)


def tile_rows(run: Any, n_rows: int, row_bytes: int, n_matrices: int) -> int:
    """Rows of weights in a tile. The results do not depend on it, so it may depend on the number of threads.

    Long tiles, for two threads in short ones that alternate stop the CPU's prefetchers and fetch each other's lines: a
    decode step of DeepSeek-V2-Lite, two threads of Zen 4, took 57.2 ms with tiles of 64 KiB, 51.6 with 128, 48.5 with
    256, 48.1 with 512.
    """
    nbytes = n_matrices * n_rows * row_bytes // (TILES_PER_THREAD * run.n_threads)
    n = int(min(n_rows, max(1, min(nbytes, MAX_TILE_BYTES) // row_bytes)))
    return n if n < 16 else n // 16 * 16  # the last 16 sums are added up together


def quantised(run: Any, kinds: set[str], x: np.ndarray, at: int = 0) -> dict[str, tuple[np.ndarray, int, int]]:
    """x (n_tok, n_head, k) as each kind of activation: (array, stride of a token, stride of a head) in bytes.

    Queues the quantisation into the run's workspace, from byte `at`.
    """
    n_tok, n_head, k = x.shape
    sizes = {kind: -(-quants.record_bytes(kind, k) * n_tok * n_head // 64) * 64 for kind in sorted(kinds - {"f32"})}
    memory = run.workspace(at + sum(sizes.values()))
    result = {"f32": (x, x.strides[0], x.strides[1])}
    for kind, size in sizes.items():
        record = quants.record_bytes(kind, k)
        part = memory[at : at + record * n_tok * n_head]
        quants.quantise_rows(run, kind, x, part)
        result[kind] = (part, record * n_head, record)
        at += size
    return result


@kernel
def decode_row(type_id):
    """One row a tile, decoded to f32."""
    from .simd import ld_i32

    decode_block, f = quants.block_decoder(type_id), quants.FORMATS[type_id]
    block, nbytes = f.block, f.nbytes

    def body(tile, scratch, w, w_row, tokens, out, out_tok, k):
        w += ld_i32(tokens + 4 * tile) * w_row
        out += tile * out_tok
        for _ in range(k // block):
            decode_block(w, out)
            w += nbytes
            out += 4 * block

    return body


def embed_rows(run: Any, weight: Any, tokens: np.ndarray, out: np.ndarray) -> None:
    """out (n_tok, k) f32 = weight (m, k) at rows tokens (n_tok,) int32, which the caller has checked to be below m."""
    (n_tok,) = array("tokens", tokens, np.int32, 1)
    k = weight.shape[-1]
    rows_f32("out", out, 2, (n_tok, k))
    data = weight.data
    array("weight", data, np.uint8, 2, (weight.shape[0], quants.row_bytes(weight.type.id, k)))
    run.launch(decode_row(type_id=weight.type.id), n_tok, (data, data.strides[0], tokens, out, out.strides[0], k))
