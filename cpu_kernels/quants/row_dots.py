"""The loops that turn a format's code for one block into dot products of a weight row. Imports Numba.

Each makes a device function (w, w_row, m, xs, k, sums) of m weight rows, w_row bytes apart, n activation rows of k
values, whose addresses lie at xs, and SUMS_BYTES at sums for each of these, to which it writes 16 f32 for each weight
row: what they add up to is the product.

It takes n activation rows at once, so that a weight is loaded and unpacked once for all of them: the code for a block
is emitted n times into one piece of code, and LLVM keeps of the n unpackings the first. An activation row has the same
sums, in the same order, for every n.

The sums of 16 rows are added up together (sums_of_16), 15 additions of vectors in place of 16 times four.

One Zen 4 core at 3.65 GHz, one token, GB/s out of the second cache; out of the first it is the same, for unpacking
bounds it: Q4_K 34.6 (15 cycles for 256 weights), Q5_K 32.4, Q6_K 39.1, Q8_0 48, Q5_0 26.8, Q4_0 27.3. Tried and slower:
two rows at a time, which share the loads of activations (Q4_K 5 %, Q6_K 2 %); f16 scales of four blocks gathered by
blends of unaligned loads (Q5_0 6 %, Q4_1 15 %); fifth bits of Q5_0 as masks loaded from memory (6 %) or as bit matrices
(17 %), or all of it permuted out of 64 bytes (25 %, with a third fewer instructions: permutations of 64 bytes have but
two of the four pipes, and take each for two cycles); the halves of four blocks apart, so that one conversion and one
scale serve both (Q5_0 14 %, Q8_0 10 %; Q4_0 and IQ4_NL gain 6 %, with AVX2 16 and 30 %, Q8_0 loses 6 there as well);
scales put together in a vector register (Q5_0 6 %, Q4_0 8 %; with 45 instructions for 54 it gains 10 % where another
tenant has the core's other thread). A stack aligned for what AVX2 spills changed nothing in 15 processes.

Tried and slower on a core that another tenant seems to share, where Q4_K gets 23 and Q5_0 15 GB/s: scales picked from
two loads by vpermt2w (Q5_0 4 %, with 42 instructions for 51); a block in half a register, so that the addition takes
its scale from memory (Q5_0 10 %, Q8_0 22 %, with a fifth less work for the pipes); to prefetch into the first cache as
well (3 to 10 %). Little gained: eight blocks for four at a time (0 to 4 %); sums of Q4_K from two products before they
are packed (1 to 4 %, but the activations would have another order).

Weights come from memory once, so each loop asks for what lies AHEAD: the CPU's own prefetchers stop where a page ends.
Zen 4, two threads, 300 MB, share of the DRAM read limit without -> with: Q5_0 81 -> 88 %, Q4_0 82 -> 91, Q4_K 86 -> 92,
Q6_K and Q8_0 91 -> 92; a decode step of DeepSeek-V2-Lite 58.4 -> 54.0 ms. 2 KiB ahead gained nothing, 16 KiB less;
towards the first cache instead of the second, 10 to 16 % less; every other line alone, half the rate for Q6_K and Q5_0.
Rows from 4 or 16 places of a tile in turns, for more streams: 0 to 16 % less.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..isa import ISA
from ..microkernel import Regs, zeros_f
from ..simd import (
    F32,
    I8,
    I64,
    VF,
    A,
    F,
    V,
    W,
    const_f,
    const_i,
    device,
    fma_,
    instruction,
    load,
    offset,
    prefetch_,
    shuffle,
    store,
)
from . import SUMS_BYTES
from .activations import BLOCK_256
from .emit import dot_signed, dot_unsigned, halves, take

AHEAD = 8192  # bytes


def ask_for(b, address, nbytes):
    """Prefetch what lies AHEAD of nbytes at an address; it may be beyond the weights."""
    for i in range(0, nbytes, 64):
        prefetch_(b, offset(b, address, AHEAD + i))


def _addresses(n):
    """An intrinsic: the n addresses that are kept at an address, as a tuple."""

    @instruction(types.UniTuple(A, n), A)
    def addresses(b, a):
        return load(b, a, ir.ArrayType(I64, n), 8)

    return addresses


def _store(n, regs, total):
    """An intrinsic (regs, address): total(b, regs, t), 16 floats, of every activation row."""

    @instruction(types.void, regs, A)
    def store_totals(b, values, a):
        for t in range(n):
            store(b, total(b, values, t), offset(b, a, SUMS_BYTES * t))

    return store_totals


def over_floats(decode, block, nbytes, n):
    """f32 activations, from the decoder alone: four sums per step, so that the loop's own chain is one addition."""
    step = max(1, 128 // block)
    regs, addresses = Regs("f", n, 1), _addresses(n)
    xs_type = types.UniTuple(A, n)
    store_totals = _store(n, regs, lambda b, acc, t: b.extract_value(acc, t))

    def emit(b, acc, w, xs, at, n_blocks):
        for t in range(n):
            x = b.add(b.extract_value(xs, t), at)
            sums = [const_f(0.0)] * 4
            i = 0
            for k in range(n_blocks):
                for c, v in decode(b, offset(b, w, k * nbytes)):
                    value = load(b, offset(b, x, 4 * (k * block + c)), VF)
                    sums[i % 4] = fma_(b, v, value, sums[i % 4])
                    i += 1
            total = b.fadd(b.fadd(sums[0], sums[1]), b.fadd(sums[2], sums[3]))
            acc = b.insert_value(acc, b.fadd(b.extract_value(acc, t), total), t)
        return acc

    @instruction(regs, regs, A, xs_type, A)
    def many(b, acc, w, xs, at):
        ask_for(b, w, step * nbytes)
        return emit(b, acc, w, xs, at, step)

    @instruction(regs, regs, A, xs_type, A)
    def one(b, acc, w, xs, at):
        return emit(b, acc, w, xs, at, 1)

    @device
    def row_sums(w, w_row, m, xs, k, sums):
        x = addresses(xs)
        for r in range(m):
            acc = zeros_f(n, 1)
            at = w + r * w_row
            i = 0
            while i + step * block <= k:
                acc = many(acc, at, x, 4 * i)
                at += step * nbytes
                i += step * block
            while i < k:
                acc = one(acc, at, x, 4 * i)
                at += nbytes
                i += block
            store_totals(acc, sums + 64 * r)

    return row_sums


def over_blocks(emit, nbytes, n):
    """q8_256 activations; emit(b, (sums, left_out), w, x) adds one block times one record.

    To 16 sums, and to 8 of what is to be taken from them, of formats that have minima: apart and as narrow as they
    are, for half a register costs half the time on Zen 4.
    """
    n_sums = 2 * n
    regs = Regs("f", n_sums, 1)

    @instruction(regs, regs, A, types.UniTuple(A, n), A)
    def block(b, acc, w, xs, at):
        ask_for(b, w, nbytes)
        for t in range(n):
            low = take(b, b.extract_value(acc, n + t), range(8))
            main, low = emit(b, (b.extract_value(acc, t), low), w, b.add(b.extract_value(xs, t), at))
            acc = b.insert_value(acc, main, t)
            acc = b.insert_value(acc, widened(b, low), n + t)
        return acc

    def total(b, acc, t):
        low = shuffle(b, b.extract_value(acc, n + t), const_f(0.0), [*range(8)] + [16] * 8)
        return b.fsub(b.extract_value(acc, t), low)

    store_totals, addresses = _store(n, regs, total), _addresses(n)

    @device
    def row_sums(w, w_row, m, xs, k, sums):
        x = addresses(xs)
        for r in range(m):
            acc = zeros_f(n_sums, 1)
            at = w + r * w_row
            for i in range(0, k // 256 * BLOCK_256, BLOCK_256):
                acc = block(acc, at, x, i)
                at += nbytes
            store_totals(acc, sums + 64 * r)

    return row_sums


def widened(b, v):
    """Floats in the first lanes of a vector of 16; the others are undefined."""
    n = v.type.count
    return shuffle(b, v, ir.Constant(v.type, ir.Undefined), [*range(n)] + [n] * (W - n))


def over_fours(codes, nbytes, centre, n):
    """q8_32 activations, 128 at a time; codes(b, (w0, w1)) gives 64 codes of two blocks, which begin with f16 d and m.

    The sum over blocks of d · scale · sum(code · x); and four blocks at once what the codes leave out, -centre · d or m
    times the block's scale · sum(x). Blocks after the row's last are stood in for by it: activations there are zeros.
    """
    signed = centre == 128 and not ISA.u8s8
    n_sums = 3 * n
    regs = Regs("f", n_sums, 1)  # of each row two sums, and in the first lanes of a third that of what is left out

    @instruction(regs, regs, A, A, A, A, types.UniTuple(A, n), A, A)
    def four(b, sums, w0, w1, w2, w3, xs, at, factors_at):
        ask_for(b, w0, 4 * nbytes)
        blocks = (w0, w1, w2, w3)
        d = halves(b, *blocks)
        left_out = d if centre is not None else halves(b, *[offset(b, w, 2) for w in blocks])
        q = [codes(b, blocks[2 * i : 2 * i + 2]) for i in range(2)]
        if signed:
            q = [b.xor(v, const_i(-128, 64, I8)) for v in q]
        for t in range(n):
            x, factors = (b.add(b.extract_value(xs, t), v) for v in (at, factors_at))
            scales = b.fmul(d, load(b, factors, V(F32, 4)))
            for i in range(2):
                part = load(b, offset(b, x, 64 * i), V(I8, 64))
                total = b.sitofp((dot_signed if signed else dot_unsigned)(b, q[i], part), VF)
                factor = take(b, scales, [2 * i] * 8 + [2 * i + 1] * 8)
                sums = b.insert_value(sums, fma_(b, total, factor, b.extract_value(sums, 3 * t + i)), 3 * t + i)
            if not signed:
                low = take(b, b.extract_value(sums, 3 * t + 2), range(4))
                low = fma_(b, left_out, load(b, offset(b, factors, 16), V(F32, 4)), low)
                sums = b.insert_value(sums, widened(b, low), 3 * t + 2)
        return sums

    def total(b, sums, t):
        main, second, low = (b.extract_value(sums, 3 * t + i) for i in range(3))
        main = b.fadd(main, second)
        if signed:
            return main
        low = shuffle(b, low, const_f(0.0), [0, 1, 2, 3] + [16] * 12)
        return fma_(b, low, const_f(1.0 if centre is None else -float(centre)), main)

    store_totals, addresses = _store(n, regs, total), _addresses(n)

    @device
    def row_sums(w, w_row, m, xs, k, sums):
        x = addresses(xs)
        factors = (k + 127) // 128 * 128
        for r in range(m):
            acc = zeros_f(n_sums, 1)
            at = w + r * w_row
            i = 0
            for _ in range(k // 128):
                acc = four(acc, at, at + nbytes, at + 2 * nbytes, at + 3 * nbytes, x, i, factors + i // 4)
                at += 4 * nbytes
                i += 128
            if i < k:
                last = at + ((k - i) // 32 - 1) * nbytes
                second, third = min(at + nbytes, last), min(at + 2 * nbytes, last)
                acc = four(acc, at, second, third, last, x, i, factors + i // 4)
            store_totals(acc, sums + 64 * r)

    return row_sums


@instruction(F, A)
def sums_of_16(b, a):
    """16 vectors of 16 floats at an address, one after the other -> the sum of each, in that order."""
    rows = [load(b, offset(b, a, 64 * i), VF) for i in range(16)]

    def add(x, y, lanes, distance):
        return b.fadd(shuffle(b, x, y, lanes), shuffle(b, x, y, [j + distance for j in lanes]))

    eight = lambda x, y: add(x, y, [*range(8), *range(16, 24)], 8)  # noqa: E731
    four = lambda x, y: add(x, y, [j + i for j in (0, 8, 16, 24) for i in range(4)], 4)  # noqa: E731
    two = lambda x, y: add(x, y, [4 * j + i for j in range(4) for i in (0, 1, 16, 17)], 2)  # noqa: E731
    one = lambda x, y: add(x, y, [4 * j + i for j in range(4) for i in (0, 2, 16, 18)], 1)  # noqa: E731
    columns = [four(eight(rows[j], rows[4 + j]), eight(rows[8 + j], rows[12 + j])) for j in range(4)]
    return one(two(columns[0], columns[1]), two(columns[2], columns[3]))
