"""The ggml formats of weights: how a block decodes, and how a row of blocks is multiplied with an activation row.

One file per family of formats, with the block drawn in its docstring. A format has two things

    decode(b, w)     a generator of LLVM code: (column, 16 floats) for one block, the same bits as gguf's dequantiser
    row_sums         weight row x activation rows; their values are f32, or int8 as `quantise_rows` leaves them

and, where int8 panels of it are worth having, a third, `codes`: 64 codes at a time, with their scales.

Activations in int8 come in three layouts:

    q8_256      for formats with blocks of 256; a row is k / 256 records of 320 bytes
                | 256 int8 | 16 int16: sums of 16 | f32 scale | 28 bytes unused (pair_panels.py: sums of 32) |
    q8_nibbles  for Q4_K and Q5_K; the same, but 32 values at a time lie in the order 0 2 1 3 4 6 5 7, as the low and
                the high nibbles of 64 bytes of theirs do
                | 256 int8 | 8 int16: sums of 32, in natural order | 8 zeros | f32 scale | 28 bytes unused |
    q8_32       for formats with blocks of 32; a row is padded with zeros to a multiple of 128 values
                | int8 values | of each 128: 4 f32 scales, 4 f32 scale · sum of its 32 | unused up to 64 bytes |

A row of q8_256 needs no shorter scale, since such weights share one f16 scale per 256 as well; q8_32 exists because
rows of 1408 or 10944 values have no blocks of 256. Every format but F32, F16 and BF16 has an int8 dot.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .activations import quantise_rows, record_bytes

__all__ = [
    "FORMATS",
    "SUMS_BYTES",
    "Format",
    "block_decoder",
    "block_codes",
    "decoder",
    "quantise_rows",
    "record_bytes",
    "row_bytes",
    "row_sums",
]

SUMS_BYTES = 1024  # of the sums of one activation row and 16 weight rows


@dataclass(frozen=True)
class Codes:
    """A format as codes 0..255: value = scale * (code - centre), or scale * code - minimum where centre is None."""

    sub: int  # values per scale
    centre: int | None
    largest: int  # code


@dataclass(frozen=True)
class Format:
    """A ggml type as the kernels see it."""

    name: str
    type_id: int
    block: int  # values per block; 32 for the plain floats
    nbytes: int  # bytes per block
    activation: str  # what row_sums reads: 'f32', 'q8_256', 'q8_nibbles' or 'q8_32'
    family: str  # the module of its code
    codes: Codes | None = None  # what int8 panels are made of; None: there is no such code


FORMATS: dict[int, Format] = {
    f.type_id: f
    for f in (
        Format("F32", 0, 32, 128, "f32", "floats"),
        Format("F16", 1, 32, 64, "f32", "floats"),
        Format("BF16", 30, 32, 64, "f32", "floats"),
        Format("Q4_0", 2, 32, 18, "q8_32", "q4", Codes(32, 8, 15)),
        Format("Q4_1", 3, 32, 20, "q8_32", "q4", Codes(32, None, 15)),
        Format("Q5_0", 6, 32, 22, "q8_32", "q5", Codes(32, 16, 31)),
        Format("Q5_1", 7, 32, 24, "q8_32", "q5", Codes(32, None, 31)),
        Format("Q8_0", 8, 32, 34, "q8_32", "q8", Codes(32, 128, 255)),
        Format("Q2_K", 10, 256, 84, "q8_256", "q2_k"),
        Format("Q3_K", 11, 256, 110, "q8_256", "q3_k", Codes(16, 4, 7)),
        Format("Q4_K", 12, 256, 144, "q8_nibbles", "q4_k", Codes(32, None, 15)),
        Format("Q5_K", 13, 256, 176, "q8_nibbles", "q4_k", Codes(32, None, 31)),
        Format("Q6_K", 14, 256, 210, "q8_256", "q6_k", Codes(16, 32, 63)),
        Format("IQ4_NL", 20, 32, 18, "q8_32", "iq4", Codes(32, 128, 255)),
        Format("IQ4_XS", 23, 256, 136, "q8_256", "iq4", Codes(32, 128, 255)),
    )
}


def row_bytes(type_id: int, k: int) -> int:
    """Bytes of a weight row of k values."""
    f = FORMATS[type_id]
    if k % f.block:
        raise ValueError(f"a row of {k} values is not made of {f.name} blocks of {f.block}")
    return k // f.block * f.nbytes


def decoder(type_id: int) -> Callable[[Any, Any], Any]:
    """decode(b, w): yields (column, <16 x f32>) in ascending order for the block at address w. Imports Numba."""
    return getattr(_family(type_id), f"decode_{FORMATS[type_id].name.lower()}")


@functools.cache
def block_decoder(type_id: int, kind: str = "f32") -> Any:
    """An intrinsic (w, out): the values of the block at w, to out as f32 or bf16. Imports Numba."""
    from numba import types

    from ..simd import A, instruction, offset, store, to_bf16

    decode = decoder(type_id)

    @instruction(types.void, A, A)
    def decode_block(b, w, out):
        low = None
        for column, values in decode(b, w):
            if kind == "f32":
                store(b, values, offset(b, out, 4 * column))
            elif column % 32 == 0:
                low = values
            else:
                store(b, to_bf16(b, low, values), offset(b, out, 2 * (column - 16)))

    return decode_block


def block_codes(type_id: int) -> Callable[[Any, Any], Any]:
    """Of a format with blocks of 32: codes(b, (w0, w1)) -> <64 x i8>; d, and m if there is one, are f16 at 0 and 2.

    Of 256: codes(b, w) -> ([4 of <64 x i8>], scales, minima or None, d, dmin or None); scales and minima are i16, one
    for each `codes.sub` values.
    Imports Numba.
    """
    return getattr(_family(type_id), f"codes_{FORMATS[type_id].name.lower()}")


@functools.cache
def row_sums(type_id: int, n: int = 1) -> Any:
    """A device function (w, w_row, m, xs, k, sums): m weight rows times n activation rows. Imports Numba.

    w, w_row  address of the first weight row, bytes to the next; m <= 16
    xs        n addresses, of rows of k f32 or of records, as FORMATS says
    sums      (n, 16, 16) f32, written for each of n and m: a product is the sum of 16

    Nothing after a weight row is read.
    """
    from . import row_dots

    f = FORMATS[type_id]
    if f.activation == "f32":
        return row_dots.over_floats(decoder(type_id), f.block, f.nbytes, n)
    if f.activation == "q8_32":
        return row_dots.over_fours(block_codes(type_id), f.nbytes, f.codes.centre, n)
    return row_dots.over_blocks(getattr(_family(type_id), f"dot_{f.name.lower()}"), f.nbytes, n)


def _family(type_id: int) -> Any:
    return importlib.import_module(f".{FORMATS[type_id].family}", __package__)
