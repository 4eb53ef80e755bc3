"""The code of one block of `activations`: imports Numba, so only kernel factories import it."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..simd import F32, I8, I16, VF, VI, A, V, W, call, instruction, load, offset, splat, store
from .activations import SCALE, SCALE_OF_WORDS, SUMS, SUMS_32


def _quantise(b, x, n, most=127.0):
    """n vectors of floats at x -> (scale, [n x <16 x i32>]), -most..most."""
    values = [load(b, offset(b, x, 64 * i), VF) for i in range(n)]
    largest = [call(b, "llvm.fabs.v16f32", VF, [v]) for v in values]
    while len(largest) > 1:
        largest = [b.select(b.fcmp_ordered(">", p, q), p, q) for p, q in zip(largest[::2], largest[1::2], strict=True)]
    top = call(b, "llvm.vector.reduce.fmax.v16f32", F32, largest)
    real = b.fcmp_ordered(">", top, ir.Constant(F32, 1e-30))
    zero, limit = ir.Constant(F32, 0.0), ir.Constant(F32, most)
    factor = splat(b, b.select(real, b.fdiv(limit, top), zero))
    rounded = [call(b, "llvm.rint.v16f32", VF, [b.fmul(v, factor)]) for v in values]
    return b.select(real, b.fdiv(top, limit), zero), [b.fptosi(v, VI) for v in rounded]


def _block_256(b, x, out):
    """Returns the sums of 16."""
    scale, q = _quantise(b, x, 16)
    totals = [b.trunc(call(b, "llvm.vector.reduce.add.v16i32", VI.element, [v]), I16) for v in q]
    for i, v in enumerate(q):
        store(b, b.trunc(v, V(I8, W)), offset(b, out, 16 * i))
        store(b, totals[i], offset(b, out, SUMS + 2 * i))
    store(b, scale, offset(b, out, SCALE))
    return totals


@instruction(types.void, A, A)
def block_256(b, x, out):
    """256 floats -> a q8_256 record"""
    _block_256(b, x, out)


@instruction(types.void, A, A)
def block_pairs(b, x, out):
    """256 floats -> a q8_256 record with sums of 32 as well"""
    totals = _block_256(b, x, out)
    for i in range(8):
        store(b, b.add(*totals[2 * i : 2 * i + 2]), offset(b, out, SUMS_32 + 2 * i))


@instruction(types.void, A, A)
def block_words(b, x, out):
    """256 floats -> 256 int16 and the scale"""
    scale, q = _quantise(b, x, 16, 32767.0)
    for i, v in enumerate(q):
        store(b, b.trunc(v, V(I16, W)), offset(b, out, 32 * i))
    store(b, scale, offset(b, out, SCALE_OF_WORDS))


@instruction(types.void, A, A)
def block_nibbles(b, x, out):
    """256 floats -> a q8_nibbles record"""
    scale, q = _quantise(b, x, 16)
    for i, v in enumerate(q):
        group = i // 2
        at = group // 4 * 4 + (0, 2, 1, 3)[group % 4]
        store(b, b.trunc(v, V(I8, W)), offset(b, out, 32 * at + 16 * (i % 2)))
    for i in range(8):
        total = call(b, "llvm.vector.reduce.add.v16i32", VI.element, [b.add(*q[2 * i : 2 * i + 2])])
        store(b, b.trunc(total, I16), offset(b, out, SUMS + 2 * i))
    store(b, ir.Constant(V(I16, 8), None), offset(b, out, SUMS + 16))
    store(b, scale, offset(b, out, SCALE))


@instruction(types.void, A, A, A)
def block_32(b, x, out, factors):
    """32 floats -> 32 int8, a scale, and 16 bytes behind it scale · their sum"""
    scale, q = _quantise(b, x, 2)
    for i, v in enumerate(q):
        store(b, b.trunc(v, V(I8, W)), offset(b, out, 16 * i))
    total = call(b, "llvm.vector.reduce.add.v16i32", VI.element, [b.add(*q)])
    store(b, scale, factors)
    store(b, b.fmul(scale, b.sitofp(total, F32)), offset(b, factors, 16))
