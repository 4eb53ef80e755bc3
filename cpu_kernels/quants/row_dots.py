"""The loops that turn a format's code for one block into the dot product of two rows. Imports Numba.

Weights come from memory once, so each loop asks for what lies AHEAD: the CPU's own prefetchers stop where a page ends.
Zen 4, two threads, 300 MB, share of the DRAM read limit without -> with: Q5_0 81 -> 88 %, Q4_0 82 -> 91, Q4_K 86 -> 92,
Q6_K and Q8_0 91 -> 92; a decode step of DeepSeek-V2-Lite 58.4 -> 54.0 ms. 2 KiB ahead gained nothing, 16 KiB less.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..isa import ISA
from ..microkernel import Regs, zeros_f
from ..simd import (
    F32,
    I8,
    VF,
    A,
    F,
    V,
    bc,
    const_f,
    const_i,
    device,
    fma_,
    hsum,
    instruction,
    load,
    offset,
    prefetch_,
    reduce_add,
    shuffle,
)
from .activations import BLOCK_256
from .emit import dot_signed, dot_unsigned, halves, take

THREE = Regs("f", 3, 1)
AHEAD = 8192  # bytes


def ask_for(b, address, nbytes):
    """Prefetch what lies AHEAD of nbytes at an address; it may be beyond the weights."""
    for i in range(0, nbytes, 64):
        prefetch_(b, offset(b, address, AHEAD + i))


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
        ask_for(b, w, step * nbytes)
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
        ask_for(b, w, nbytes)
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


def over_fours(codes, nbytes, centre):
    """q8_32 activations, 128 at a time; codes(b, (w0, w1)) gives 64 codes of two blocks, which begin with f16 d and m.

    The sum over blocks of d · scale · sum(code · x); and four blocks at once what the codes leave out, -centre · d or m
    times the block's scale · sum(x). Blocks after the row's last are stood in for by it: activations there are zeros.
    """
    signed = centre == 128 and not ISA.u8s8

    @instruction(THREE, THREE, A, A, A, A, A, A)
    def four(b, sums, w0, w1, w2, w3, x, factors):
        ask_for(b, w0, 4 * nbytes)
        blocks = (w0, w1, w2, w3)
        d = halves(b, *blocks)
        scales = b.fmul(d, load(b, factors, V(F32, 4)))
        for i in range(2):
            q, part = codes(b, blocks[2 * i : 2 * i + 2]), load(b, offset(b, x, 64 * i), V(I8, 64))
            total = dot_signed(b, b.xor(q, const_i(-128, 64, I8)), part) if signed else dot_unsigned(b, q, part)
            factor = take(b, scales, [2 * i] * 8 + [2 * i + 1] * 8)
            sums = b.insert_value(sums, fma_(b, b.sitofp(total, VF), factor, b.extract_value(sums, i)), i)
        if not signed:
            left_out = d if centre is not None else halves(b, *[offset(b, w, 2) for w in blocks])
            low = take(b, b.extract_value(sums, 2), range(4))
            low = fma_(b, left_out, load(b, offset(b, factors, 16), V(F32, 4)), low)
            sums = b.insert_value(
                sums, shuffle(b, low, ir.Constant(low.type, ir.Undefined), [0, 1, 2, 3] + [4] * 12), 2
            )
        return sums

    @instruction(types.float32, THREE)
    def total(b, sums):
        main = reduce_add(b, b.fadd(b.extract_value(sums, 0), b.extract_value(sums, 1)))
        low = reduce_add(b, take(b, b.extract_value(sums, 2), range(4)))
        return b.fadd(main, low if centre is None else b.fmul(low, ir.Constant(F32, float(-centre))))

    @device
    def row_dot(w, x, k):
        sums = zeros_f(3, 1)
        factors = x + (k + 127) // 128 * 128
        i = 0
        while i + 128 <= k:
            sums = four(sums, w, w + nbytes, w + 2 * nbytes, w + 3 * nbytes, x, factors)
            w += 4 * nbytes
            x += 128
            factors += 32
            i += 128
        if i < k:
            last = w + ((k - i) // 32 - 1) * nbytes
            sums = four(sums, w, min(w + nbytes, last), min(w + 2 * nbytes, last), last, x, factors)
        return total(sums)

    return row_dot
