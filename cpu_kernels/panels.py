"""Products of quantised weights and many rows of activations, by panels decoded in the first cache.

    weights   PANEL_ROWS rows x 256 columns are decoded at a time into a panel [columns / g][PANEL_ROWS][g]; g values of
              32 bits: 4 int8, 2 int16 or bf16, 1 f32. Nothing is kept: the file's bytes are the only copy of a weight
    rows      packed once: [k / 256][n_rows][256], so that a pass over all rows reads memory in order
    sums      [n_rows][PANEL_ROWS] f32, in the thread's scratch

The microkernel then runs over all rows for each panel. `kind` is what both sides are multiplied in:

    f32    F32 and F16 weights, and all where the CPU has nothing better
    int8   formats with codes (quants.Codes) on CPUs with dot products of four bytes, see int8_panels.py; and with plain
           AVX2 if the codes are below 128, see pair_panels.py
    int16  formats with larger codes with plain AVX2
    bf16   the rest

Decoding reads a short piece of each of a panel's rows, which the CPU's own prefetchers do not follow, so the weights
that a thread is likely to need next are prefetched while it multiplies. 64 experts of V2-Lite, Q4_K and Q8_0, with 48
tokens each, one Zen 4 core: 52 -> 67 % of the int8 peak. With hundreds of tokens to a panel it gains 1-2 %.

Without AVX-512 a panel is 16 rows wide: 12 ymm of sums and nothing spilled, 16 KiB that leave room in the first cache.
Zen 4 as Haswell, 512 rows of Q4_K in f32: 24 G products/s of 58 with panels of 32 rows, 50 with these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import quants
from ._jit import kernel
from .isa import ISA
from .quants.activations import BLOCK_256, WORDS_256

N_VEC = 4 if ISA.avx512 else 1
PANEL_ROWS = 16 * N_VEC
BLOCK_ROWS = ISA.n_acc // N_VEC  # activation rows of a register block
COLUMNS = 256
MAX_ROWS = 768 // BLOCK_ROWS * BLOCK_ROWS  # of a tile: its sums are then 192 KiB, in the second cache
PACKED_ROWS = 16  # of a tile of pack_rows
# of 256 values of a row
PACKED_BYTES = {"f32": 4 * COLUMNS, "bf16": 2 * COLUMNS, "int8": BLOCK_256, "int16": WORDS_256}
PANEL_BYTES = 4 * COLUMNS * (PANEL_ROWS + 16)  # scratch of a product beside its sums


def kind_of(type_id: int, k: int) -> str:
    """What rows of k values of a format are multiplied in."""
    f = quants.FORMATS[type_id]
    if f.name in ("F32", "F16"):
        return "f32"
    if f.codes is not None and k % max(64, f.block) == 0:
        if ISA.int8:
            return "int8"
        if ISA.avx2:
            return "int8" if f.codes.largest <= 127 else "int16"
    return ISA.panel


def packed_bytes(kind: str, n_rows: int, k: int) -> int:
    """Bytes of n_rows packed rows of k values; the microkernel may read, not use, BLOCK_ROWS - 1 rows more."""
    return block_bytes(kind, n_rows) * -(-k // COLUMNS)


def block_bytes(kind: str, n_rows: int) -> int:
    """Bytes from one block of 256 columns to the next."""
    return (n_rows + BLOCK_ROWS - 1) * PACKED_BYTES[kind]


@kernel
def pack_rows(kind):
    """PACKED_ROWS rows a tile. Row i of the result is row order[i] // divisor of x, or row i where order is 0."""
    from .quants.quantise_blocks import block_256, block_pairs, block_words
    from .simd import bc, ld, ld_i32, st, st_bf16

    nbytes = PACKED_BYTES[kind]
    integers = kind in ("int8", "int16")
    whole = COLUMNS if integers else 16
    quantise = block_words if kind == "int16" else block_256 if ISA.int8 else block_pairs

    def body(tile, scratch, x, x_row, order, divisor, n_rows, k, packed, block):
        for i in range(tile * PACKED_ROWS, min(n_rows, tile * PACKED_ROWS + PACKED_ROWS)):
            row = ld_i32(order + 4 * i) // divisor if order != 0 else i
            source = x + row * x_row
            to = packed + i * nbytes
            for c in range(0, k // whole * whole, whole):
                if integers:
                    quantise(source + 4 * c, to + c // COLUMNS * block)
                elif kind == "bf16":
                    st_bf16(to + c // COLUMNS * block + c % COLUMNS * 2, ld(source + 4 * c))
                else:
                    st(to + c // COLUMNS * block + c % COLUMNS * 4, ld(source + 4 * c))
            last = k % whole  # the rest of a record is zeros
            if last != 0:
                for c in range(0, COLUMNS, 16):
                    st(scratch + 4 * c, ld(source + 4 * (k - last + c)) if c < last else bc(0.0))
                quantise(scratch, to + k // COLUMNS * block)

    return body


def launch_pack(run: Any, kind: str, x: np.ndarray, packed: np.ndarray, order: Any = 0, divisor: int = 1) -> None:
    """Queue the packing of x (n, k) f32, or of its rows order // divisor, (n_rows,) int32."""
    n_rows = len(order) if isinstance(order, np.ndarray) else len(x)
    args = (x, x.strides[0], order, divisor, n_rows, x.shape[1], packed, block_bytes(kind, n_rows))
    run.launch(pack_rows(kind=kind), -(-n_rows // PACKED_ROWS), args)


def panel_product(type_id: int, kind: str) -> Any:
    """A device function (w, w_row, n_w, k, x, block, n, sums, memory, ahead): sums = packed rows times weight rows.

    n packed rows at x, n_w weight rows at w, at most PANEL_ROWS; meanwhile as many weight rows at `ahead` come towards
    the second cache. sums has room for n rounded up to BLOCK_ROWS, and columns from n_w on are undefined; memory is
    PANEL_BYTES. For kernel factories.
    """
    if kind in ("int8", "int16"):
        from . import int8_panels, pair_panels

        return int8_panels.panel_product(type_id) if ISA.int8 else pair_panels.panel_product(type_id, kind)
    from .microkernel import load_regs, rank1_bf16, rank1_f32, store_regs, zeros_f
    from .simd import device, prefetch, transpose16

    ahead_step = device(bytes_ahead)
    decode_block, f = quants.block_decoder(type_id, kind), quants.FORMATS[type_id]
    w_block, w_nbytes = f.block, f.nbytes
    size = 2 if kind == "bf16" else 4
    rank1 = rank1_bf16 if kind == "bf16" else rank1_f32
    ROW = COLUMNS * size
    STEP = PANEL_ROWS * 4

    @device
    def product(w, w_row, n_w, k, x, block, n, sums, memory, ahead):
        decoded, panel = memory, memory + 16 * ROW
        step = ahead_step(n_w * w_row, k, n, BLOCK_ROWS)
        for c in range(0, k, COLUMNS):
            width = min(COLUMNS, k - c)
            for g in range(0, n_w, 16):
                for r in range(min(16, n_w - g)):
                    source = w + (g + r) * w_row + c // w_block * w_nbytes
                    for i in range(width // w_block):
                        decode_block(source + i * w_nbytes, decoded + r * ROW + i * w_block * size)
                for i in range(0, width * size, 64):
                    transpose16(decoded + i, ROW, panel + i // 4 * STEP + 4 * g, STEP)
            for t in range(0, n, BLOCK_ROWS):
                for i in range(0, step, 64):
                    prefetch(ahead + i)
                ahead += step
                to = sums + t * STEP
                acc = zeros_f(BLOCK_ROWS, N_VEC)
                if c > 0:
                    acc = load_regs(acc, to, STEP)
                p, q = panel, x + t * ROW
                for _ in range(width * size // 4):
                    acc = rank1(acc, p, q, ROW)
                    p += STEP
                    q += 4
                store_regs(acc, to, STEP)
            x += block

    return product


def bytes_ahead(nbytes: int, k: int, n: int, n_block: int) -> int:
    """Bytes to prefetch with each of the n_block rows of x, at each of the blocks of columns, so as to reach nbytes."""
    n_steps = (k + COLUMNS - 1) // COLUMNS * ((n + n_block - 1) // n_block)
    return nbytes // max(1, n_steps) + 1


@kernel
def multiply(type_id, kind, accumulate):
    """A tile: PANEL_ROWS rows of the weight times n_chunk rows of x, written or added to out."""
    from .simd import ld, ld_scalar, st, st_scalar

    product = panel_product(type_id, kind)
    nbytes = PACKED_BYTES[kind]

    def body(tile, scratch, w, w_row, n_w, k, x, block, n_tok, n_chunk, out, out_row, n_threads):
        panels = (n_w + PANEL_ROWS - 1) // PANEL_ROWS
        first, start = tile % panels * PANEL_ROWS, tile // panels * n_chunk
        rows, n = min(PANEL_ROWS, n_w - first), min(n_chunk, n_tok - start)
        sums = scratch + PANEL_BYTES
        ahead = w + (tile + n_threads) % panels * PANEL_ROWS * w_row  # perhaps this thread's next tile
        product(w + first * w_row, w_row, rows, k, x + start * nbytes, block, n, sums, scratch, ahead)
        for t in range(n):
            source, to = sums + t * PANEL_ROWS * 4, out + (start + t) * out_row + 4 * first
            for r in range(0, rows // 16 * 16, 16):
                v = ld(source + 4 * r)
                st(to + 4 * r, v + ld(to + 4 * r) if accumulate else v)
            for r in range(rows // 16 * 16, rows):
                s = ld_scalar(source + 4 * r)
                st_scalar(to + 4 * r, s + ld_scalar(to + 4 * r) if accumulate else s)

    return body


def launch_multiply(
    run: Any, weight: Any, x: np.ndarray, packed: np.ndarray, out: np.ndarray, accumulate: bool, barrier: bool
) -> None:
    """Queue out (n_tok, m) = packed x (n_tok, k) @ weight (m, k).T."""
    (n_tok, k), m = x.shape, weight.shape[0]
    kind = kind_of(weight.type.id, k)
    n_panels = -(-m // PANEL_ROWS)
    most = MAX_ROWS if n_panels >= 8 else 96  # few panels are cut along the other side, so that threads have work
    n_chunks = -(-n_tok // most)
    n_chunk = -(-n_tok // (n_chunks * BLOCK_ROWS)) * BLOCK_ROWS
    args = (weight.data, weight.data.strides[0], m, k, packed, block_bytes(kind, n_tok), n_tok, n_chunk)
    run.launch(
        multiply(type_id=weight.type.id, kind=kind, accumulate=accumulate), n_panels * -(-n_tok // n_chunk),
        (*args, out, out.strides[0], run.n_threads), barrier,
    )  # fmt: skip
