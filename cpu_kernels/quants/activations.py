"""Activations in int8: q8_256, q8_nibbles and q8_32, drawn in the package's docstring.

    scale = max |x| / 127 over the block,  q = round_to_nearest_even(x / scale)

so that q lies in -127..127 and can be negated. A block whose values are all below 1e-30 becomes zeros with scale 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._jit import kernel

BLOCK_256 = 320  # bytes of a q8_256 or q8_nibbles record
SUMS, SCALE = 256, 288  # where in it
SUMS_32 = 292  # 8 int16, of records that pair_panels.py reads
WORDS_256, SCALE_OF_WORDS = 576, 512  # bytes of a record of 256 int16, also read there, and where its scale is
CHUNK = 2048  # values per tile


def record_bytes(activation: str, k: int) -> int:
    """Bytes of an activation row of k values."""
    if activation == "f32":
        return 4 * k
    if activation in ("q8_256", "q8_nibbles"):
        return k // 256 * BLOCK_256
    assert activation == "q8_32", activation
    return ((k + 127) // 128 * 160 + 63) // 64 * 64


def quantise_rows(run: Any, activation: str, x: np.ndarray, out: np.ndarray) -> None:
    """Queue the quantisation of rows.

    activation  'q8_256' or 'q8_nibbles' (k a multiple of 256), or 'q8_32' (of 32)
    x           (n_rows, k) or (n_tok, n_head, k) f32, last axis contiguous, leading strides free
    out         (n_rows or n_tok * n_head, record_bytes(activation, k)) u8, C-contiguous, written
    """
    k = x.shape[-1]
    block = 32 if activation == "q8_32" else 256
    n_rows = x.size // k if k else 0
    record = record_bytes(activation, k)
    if x.dtype != np.float32 or x.ndim not in (2, 3) or x.strides[-1] != 4:
        raise ValueError(f"x is {x.dtype} {x.shape} with strides {x.strides}; expected float32 rows, contiguous each")
    if k % block:
        raise ValueError(f"rows of {k} values cannot be quantised to {activation}: not a multiple of {block}")
    if out.dtype != np.uint8 or out.size != n_rows * record or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}; expected contiguous uint8 ({n_rows}, {record})")
    n_inner, inner = (x.shape[1], x.strides[1]) if x.ndim == 3 else (1, 0)
    code = quantise_32() if activation == "q8_32" else quantise_256(nibbles=activation == "q8_nibbles")
    chunks = (k + CHUNK - 1) // CHUNK
    run.launch(code, n_rows * chunks, (x, x.strides[0], inner, n_inner, k, out, record))


@kernel
def quantise_256(nibbles):
    """A tile is CHUNK values of a row."""
    from .quantise_blocks import block_256, block_nibbles

    block = block_nibbles if nibbles else block_256

    def body(tile, scratch, x, outer, inner, n_inner, k, out, record):
        chunks = (k + CHUNK - 1) // CHUNK
        row, first = tile // chunks, tile % chunks * CHUNK
        x += row // n_inner * outer + row % n_inner * inner
        out += row * record
        for i in range(first, min(first + CHUNK, k), 256):
            block(x + 4 * i, out + i // 256 * BLOCK_256)

    return body


@kernel
def quantise_32():
    """A tile is CHUNK values of a row; the last one of a row also writes the padding."""
    from ..simd import bci, st_scalar, sti
    from .quantise_blocks import block_32

    def body(tile, scratch, x, outer, inner, n_inner, k, out, record):
        chunks = (k + CHUNK - 1) // CHUNK
        row, first = tile // chunks, tile % chunks * CHUNK
        x += row // n_inner * outer + row % n_inner * inner
        out += row * record
        padded = (k + 127) // 128 * 128
        last = min(first + CHUNK, k)
        if last == k and k != padded:
            sti(out + padded - 128, bci(0))
            sti(out + padded - 64, bci(0))
            for i in range(k, padded, 32):
                factors = out + padded + i // 128 * 32 + i % 128 // 8
                st_scalar(factors, 0.0)
                st_scalar(factors + 16, 0.0)
        for i in range(first, last, 32):
            block_32(x + 4 * i, out + i, out + padded + i // 128 * 32 + i % 128 // 8)

    return body
