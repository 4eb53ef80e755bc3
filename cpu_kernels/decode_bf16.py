"""mla_decode in bf16: dot products of pairs, sums in f32. See attention.py.

    scores   lanes: 16 queries, panel [(C + R) / 2][16][2]        broadcast: 24 rows, where they lie in the cache
    values   lanes: 32 dimensions, two rows zipped, in L1         broadcast: probabilities of 8 queries

Zipping swaps within 128-bit lanes, one cheap instruction a register (a full interleave takes twice as long); the order
of dimensions that this leaves is undone once, after merging.
"""

from typing import Any

from .isa import ISA


def padded_row(C: int, R: int) -> int:
    """Bytes of a packed query, a multiple of 64."""
    return (2 * (C + R) + 63) // 64 * 64


def panel_bytes(C: int, R: int) -> int:
    """[(C + R) / 2][16][2] bf16"""
    return 16 * padded_row(C, R)


def n_out(C: int) -> int:
    """Outputs of a lane."""
    return C


def packing() -> Any:
    """A device function (x, scale, row, _, C, R): a query, scaled."""
    from .simd import bc, device, ld, st_bf16

    @device
    def pack(x, scale, row, _, C, R):
        for i in range(0, C + R, 16):
            st_bf16(row + 2 * i, ld(x + 4 * i) * bc(scale))

    return pack


def scores() -> Any:
    """A device function: scores [n][16] f32 of a group; the next rows are prefetched, at last those at `ahead`."""
    from .microkernel import rank1_bf16, store_regs, zeros_f
    from .simd import device, prefetch

    M = ISA.n_acc

    @device
    def add_scores(panel, rows, stride, n, ahead, ahead_stride, scores, C, R):
        step = M * stride // ((C + R) // 4)
        for t in range(0, n, M):
            acc = zeros_f(M, 1)
            w, x = panel, rows + t * stride
            line = x + M * stride if t + M < n else ahead
            for _ in range((C + R) // 4):
                for i in range(3):
                    prefetch(line + 64 * i)
                line += step
                acc = rank1_bf16(acc, w, x, stride)
                acc = rank1_bf16(acc, w + 64, x + 4, stride)
                w += 128
                x += 8
            store_regs(acc, scores + 64 * t, 64)

    return add_scores


def weights() -> Any:
    """A device function: probabilities [n][16] f32 become weights of values, [n / 2][16][2] bf16, in place."""
    from .simd import device, ld, pair_bf16, sti

    @device
    def weigh(p, rows, stride, n, unit, C, R):
        for t in range(0, n, 2):
            sti(p + 32 * t, pair_bf16(ld(p + 64 * t), ld(p + 64 * t + 64)))

    return weigh


def values() -> Any:
    """A device function: outputs (n_lanes, C) times fades, plus weights times latents; in zip_rows's order."""
    from numba import types

    from .microkernel import load_regs, mul_rows, rank1_bf16, store_regs, zeros_f
    from .simd import I16, A, V, device, instruction, load, offset, shuffle, store

    MH = 8

    @instruction(types.void, A, A, A)
    def zip_rows(b, row, stride, to):
        """32 values of two rows -> pairs: 4 and 4 of every 8 dimensions go to the first and to the second register."""
        x, y = load(b, row, V(I16, 32)), load(b, b.add(row, stride), V(I16, 32))
        for half in (0, 1):
            index = [8 * (i // 8) + 4 * half + i % 8 // 2 + 32 * (i % 2) for i in range(32)]
            store(b, shuffle(b, x, y, index), offset(b, to, 64 * half))

    @device
    def add_values(p, p_group, n_lanes, fades, units, rows, stride, n, zipped, out, C):
        for d in range(0, C, 32):
            for t in range(0, n, 2):
                zip_rows(rows + t * stride + 2 * d, stride, zipped + 64 * t)
            for h in range(0, n_lanes, MH):
                to = out + (h * C + d) * 4
                acc = mul_rows(load_regs(zeros_f(MH, 2), to, C * 4), fades + 4 * h)
                w, x = zipped, p + h // 16 * p_group + h % 16 * 4
                for _ in range(n // 2):
                    acc = rank1_bf16(acc, w, x, 4)
                    w += 128
                    x += 64
                store_regs(acc, to, C * 4)

    return add_values


def order() -> Any:
    """A device function (x, n): outputs to the order of the latent, in place."""
    from numba import types

    from .simd import VF, A, device, instruction, load, offset, shuffle, store

    @instruction(types.void, A)
    def unzip(b, x):
        pair = [load(b, offset(b, x, 64 * half), VF) for half in (0, 1)]
        for k in (0, 1):
            index = [16 * (i // 4 % 2) + 4 * (2 * k + i // 8) + i % 4 for i in range(16)]
            store(b, shuffle(b, *pair, index), offset(b, x, 64 * k))

    @device
    def in_order(x, n):
        for i in range(0, n, 32):
            unzip(x + 4 * i)

    return in_order
