"""Products of quantised weights and many rows of activations, by panels decoded in the first cache.

    weights   PANEL_ROWS rows x 256 columns are decoded at a time into a panel [columns / g][PANEL_ROWS][g]; g values of
              32 bits: 2 bf16 or 1 f32. Nothing is kept: the file's bytes are the only copy of a weight
    rows      packed once: [k / 256][n_rows][256], so that a pass over all rows reads memory in order
    sums      [n_rows][PANEL_ROWS] f32, in the thread's scratch

The microkernel then runs over all rows for each panel. `kind` is what both sides are multiplied in: f32 for F32 and F16
weights, else ISA.panel. One product serves every format. Decoding costs 0.07-0.19 ns a weight, a product of 48 rows
0.2, one of 512 2.1, so repacked copies of the weights would gain little; int8 panels would gain at most 1.3 and err
three times as much (0.6 % against 0.23 % with bf16, of normal data).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import quants
from ._jit import kernel
from .isa import ISA

N_VEC = 4 if ISA.avx512 else 2
PANEL_ROWS = 16 * N_VEC
BLOCK_ROWS = ISA.n_acc // N_VEC  # activation rows of a register block
COLUMNS = 256
MAX_ROWS = 768 // BLOCK_ROWS * BLOCK_ROWS  # of a tile: its sums are then 192 KiB, in the second cache
PACKED_ROWS = 16  # of a tile of pack_rows
PANEL_BYTES = 4 * COLUMNS * (PANEL_ROWS + 16)  # scratch of a product beside its sums


def kind_of(type_id: int) -> str:
    """What a weight is multiplied in: plain floats exactly, the others as fast as the CPU does it."""
    return "f32" if quants.FORMATS[type_id].name in ("F32", "F16") else ISA.panel


def packed_bytes(kind: str, n_rows: int, k: int) -> int:
    """Bytes of n_rows packed rows of k values; the microkernel may read, not use, BLOCK_ROWS - 1 rows more."""
    return block_bytes(kind, n_rows) * -(-k // COLUMNS)


def block_bytes(kind: str, n_rows: int) -> int:
    """Bytes from one block of 256 columns to the next."""
    return (n_rows + BLOCK_ROWS - 1) * COLUMNS * (2 if kind == "bf16" else 4)


@kernel
def pack_rows(kind):
    """PACKED_ROWS rows a tile. Row i of the result is row order[i] // divisor of x, or row i where order is 0."""
    from .simd import ld, ld_i32, st, st_bf16

    bf16 = kind == "bf16"
    size = 2 if bf16 else 4

    def body(tile, scratch, x, x_row, order, divisor, n_rows, k, packed, block):
        for i in range(tile * PACKED_ROWS, min(n_rows, tile * PACKED_ROWS + PACKED_ROWS)):
            row = ld_i32(order + 4 * i) // divisor if order != 0 else i
            source = x + row * x_row
            for c in range(0, k, 16):
                to = packed + c // COLUMNS * block + (i * COLUMNS + c % COLUMNS) * size
                if bf16:
                    st_bf16(to, ld(source + 4 * c))
                else:
                    st(to, ld(source + 4 * c))

    return body


def launch_pack(run: Any, kind: str, x: np.ndarray, packed: np.ndarray, order: Any = 0, divisor: int = 1) -> None:
    """Queue the packing of x (n, k) f32, or of its rows order // divisor, (n_rows,) int32."""
    n_rows = len(order) if isinstance(order, np.ndarray) else len(x)
    args = (x, x.strides[0], order, divisor, n_rows, x.shape[1], packed, block_bytes(kind, n_rows))
    run.launch(pack_rows(kind=kind), -(-n_rows // PACKED_ROWS), args)


def panel_product(type_id: int, kind: str) -> Any:
    """A device function (w, w_row, n_w, k, x, block, n, sums, memory): sums = n packed rows at x times n_w weight rows.

    n_w is at most PANEL_ROWS; sums has room for n rounded up to BLOCK_ROWS, and columns from n_w on are undefined;
    memory is PANEL_BYTES. For kernel factories.
    """
    from .microkernel import load_regs, rank1_bf16, rank1_f32, store_regs, zeros_f
    from .simd import device, transpose16

    decode_block, f = quants.block_decoder(type_id, kind), quants.FORMATS[type_id]
    w_block, w_nbytes = f.block, f.nbytes
    size = 2 if kind == "bf16" else 4
    rank1 = rank1_bf16 if kind == "bf16" else rank1_f32
    ROW = COLUMNS * size
    STEP = PANEL_ROWS * 4

    @device
    def product(w, w_row, n_w, k, x, block, n, sums, memory):
        decoded, panel = memory, memory + 16 * ROW
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


@kernel
def multiply(type_id, kind, accumulate):
    """A tile: PANEL_ROWS rows of the weight times n_chunk rows of x, written or added to out."""
    from .simd import ld, ld_scalar, st, st_scalar

    product = panel_product(type_id, kind)
    size = 2 if kind == "bf16" else 4

    def body(tile, scratch, w, w_row, n_w, k, x, block, n_tok, n_chunk, out, out_row):
        panels = (n_w + PANEL_ROWS - 1) // PANEL_ROWS
        first, start = tile % panels * PANEL_ROWS, tile // panels * n_chunk
        rows, n = min(PANEL_ROWS, n_w - first), min(n_chunk, n_tok - start)
        sums = scratch + PANEL_BYTES
        product(w + first * w_row, w_row, rows, k, x + start * COLUMNS * size, block, n, sums, scratch)
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
    (n_tok, k), m, kind = x.shape, weight.shape[0], kind_of(weight.type.id)
    n_panels = -(-m // PANEL_ROWS)
    most = MAX_ROWS if n_panels >= 8 else 96  # few panels are cut along the other side, so that threads have work
    n_chunks = -(-n_tok // most)
    n_chunk = -(-n_tok // (n_chunks * BLOCK_ROWS)) * BLOCK_ROWS
    args = (weight.data, weight.data.strides[0], m, k, packed, block_bytes(kind, n_tok), n_tok, n_chunk)
    run.launch(
        multiply(type_id=weight.type.id, kind=kind, accumulate=accumulate), n_panels * -(-n_tok // n_chunk),
        (*args, out, out.strides[0]), barrier,
    )  # fmt: skip
