"""The loops that turn a format's code for one block into the dot product of two rows. Imports Numba."""

from __future__ import annotations

from numba import types

from ..simd import I8, VF, A, F, V, bc, const_f, device, fma_, hsum, instruction, load, offset
from .activations import BLOCK_256


def over_floats(decode, block, nbytes):
    """f32 activations, from the decoder alone: four sums per step, so that the loop's own chain is one addition."""
    step = max(1, 128 // block)

    def emit(b, acc, w, x, n):
        sums = [const_f(0.0)] * 4
        i = 0
        for k in range(n):
            for c, v in decode(b, offset(b, w, k * nbytes)):
                value = load(b, offset(b, x, 4 * (k * block + c)), VF)
                sums[i % 4] = fma_(b, v, value, sums[i % 4])
                i += 1
        return b.fadd(acc, b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3])))

    @instruction(F, F, A, A)
    def many(b, acc, w, x):
        return emit(b, acc, w, x, step)

    @instruction(F, F, A, A)
    def one(b, acc, w, x):
        return emit(b, acc, w, x, 1)

    @device
    def row_dot(w, x, k):
        acc = bc(types.float32(0))
        i = 0
        while i + step * block <= k:
            acc = many(acc, w, x)
            w += step * nbytes
            x += step * block * 4
            i += step * block
        while i < k:
            acc = one(acc, w, x)
            w += nbytes
            x += block * 4
            i += block
        return hsum(acc)

    return row_dot


def over_blocks(emit, nbytes):
    """q8_256 activations; emit(b, acc, w, x) adds one block times one record to 16 sums."""

    @instruction(F, F, A, A)
    def block(b, acc, w, x):
        return emit(b, acc, w, x)

    @device
    def row_dot(w, x, k):
        acc = bc(types.float32(0))
        for _ in range(k // 256):
            acc = block(acc, w, x)
            w += nbytes
            x += BLOCK_256
        return hsum(acc)

    return row_dot


def over_pairs(emit, nbytes):
    """q8_32 activations, 64 at a time; emit(b, acc, (w0, w1), 64 int8, address of 2 scales) adds to 16 sums.

    An odd last block stands in for its missing neighbour too: the activations there are 0 and have scale 0.
    """

    @instruction(F, F, A, A, A, A)
    def pair(b, acc, w0, w1, x, scales):
        return emit(b, acc, (w0, w1), load(b, x, V(I8, 64)), scales)

    @device
    def row_dot(w, x, k):
        a0 = bc(types.float32(0))
        a1 = a0
        scales = x + (k + 63) // 64 * 64
        i = 0
        while i + 128 <= k:
            a0 = pair(a0, w, w + nbytes, x, scales)
            a1 = pair(a1, w + 2 * nbytes, w + 3 * nbytes, x + 64, scales + 8)
            w += 4 * nbytes
            x += 128
            scales += 16
            i += 128
        if i + 64 <= k:
            a0 = pair(a0, w, w + nbytes, x, scales)
            w += 2 * nbytes
            x += 64
            scales += 8
            i += 64
        if i < k:
            a1 = pair(a1, w, w, x, scales)
        return hsum(a0 + a1)

    return row_dot
