"""mla_decode in int8: dot products of fours for latent and values, of bf16 pairs for the rope part. See attention.py.

    row      [ latent, C bytes: value + 128 | rope, R bf16 | f32 scale ]
    query    latent as int8 with one scale a lane, rope as bf16

    scores   lanes: 16 queries, panels [C / 4][16][4] int8 and [R / 2][16][2] bf16    broadcast: 24 rows, where they lie
             s = (sum_c u8[t, c] · q8[c] - 128 · sum_c q8[c]) · scale[t] · scale_q + sum_r rope[t, r] · q_rope[r]
    values   lanes: 64 dimensions, four rows zipped, in L1                            broadcast: weights of 4 queries
             weight = probability · scale[t], in LEVELS steps up to the lane's largest in these rows; outputs are f32

Zipped in registers for 16 queries at a time, as in decode_bf16.py, it loads more than it saves: the same speed with 16
heads, 4 % less with 128.

The sum over the query is one number a lane, so rows need not bring one. CPUs whose dot product is of signed bytes only
(SIGNED) take 128 from the latent's bytes as they broadcast them, and have no such sum. Zipping swaps within 128-bit
lanes; the order of dimensions that this leaves is undone once, after merging.

Plain AVX2 adds two products in 16 bits before all else: with queries up to 64 and weights up to 127 these do not clip.
Zen 4 as Haswell, one thread, 16 heads, ns a row, in f32 of widened rows -> so: 512 + 64 360 -> 202, 128 + 32 98 -> 61.
A product is three instructions and needs a register between them and one of ones, so scores take 4 rows at a time, and
not 6, which LLVM spills: 12 % faster at 512 + 64, 15 at 128 + 32.
NMSE at unit spread, 512 + 64, 101 rows: f32 1.1e-4, with AVX-512 1.9e-4, here 4.3e-4. Queries up to 127, when the sign
of a row's bytes is put on the query's (vpsignb), would have 2.9e-4, but be only 1.3 times as fast as f32.
"""

from typing import Any

from .isa import ISA

LEVELS = 255 if ISA.u8s8 else 127
SIGNED = ISA.dotprod and not ISA.u8s8
LARGEST = 127 if ISA.int8 else 64  # of a query


def padded_row(C: int, R: int) -> int:
    """Bytes of a packed query, a multiple of 64."""
    return (C + 2 * R + 63) // 64 * 64


def panel_bytes(C: int, R: int) -> int:
    """The two panels, then [16] f32 scales and [16] int32 to start from: -128 · sum_c q8[c], or 0"""
    return 16 * padded_row(C, R) + 128


def n_out(C: int) -> int:
    """Outputs of a lane, in whole blocks of 64; what is beyond C is taken from the rope part and means nothing."""
    return (C + 63) // 64 * 64


def packing() -> Any:
    """A device function (x, scale, row, of_lane, C, R): a query, scaled; scale and sum to of_lane and 64 after it."""
    from .simd import bc, bci, device, hmax, hsumi, ld, st_bf16, st_i8, st_i32, st_scalar, to_i, vabs, vmax

    start = 0 if SIGNED else -128

    @device
    def pack(x, scale, row, of_lane, C, R):
        top = bc(1e-30)
        for i in range(0, C, 16):
            top = vmax(top, vabs(ld(x + 4 * i)))
        step = hmax(top) / LARGEST
        total = bci(0)
        for i in range(0, C, 16):
            v = to_i(ld(x + 4 * i) * bc(1.0 / step))
            total = total + v
            st_i8(row + i, v)
        st_scalar(of_lane, step * scale)
        st_i32(of_lane + 64, start * hsumi(total))
        for i in range(0, R, 16):
            st_bf16(row + C + 2 * i, ld(x + 4 * (C + i)) * bc(scale))

    return pack


def scores() -> Any:
    """A device function: scores [n][16] f32 of a group; meanwhile `fetch` bytes from `ahead` on are prefetched."""
    from .microkernel import (
        fold_regs,
        load_regs,
        mul_regs,
        rank1_bf16,
        rank1_s8,
        rank1_ws8,
        store_regs,
        zeros_f,
        zeros_i,
    )
    from .simd import device, prefetch

    M, row_bytes = ISA.n_acc if ISA.int8 else 4, device(padded_row)
    rank1_bytes = rank1_s8 if SIGNED else rank1_ws8

    @device
    def add_scores(panel, rows, stride, n, ahead, fetch, scores, C, R):
        of_lanes = panel + 16 * row_bytes(C, R)
        step = fetch // (n // M * (C // 8 + R // 4))
        for t in range(0, n, M):
            w, x = panel, rows + t * stride
            ints = load_regs(zeros_i(M, 1), of_lanes + 64, 0)
            for _ in range(C // 8):
                for i in range(3):
                    prefetch(ahead + 64 * i)
                ahead += step
                ints = rank1_bytes(ints, w, x, stride)
                ints = rank1_bytes(ints, w + 64, x + 4, stride)
                w += 128
                x += 8
            acc = mul_regs(fold_regs(zeros_f(M, 1), ints, x + 2 * R, stride), of_lanes)
            for _ in range(R // 4):
                for i in range(3):
                    prefetch(ahead + 64 * i)
                ahead += step
                acc = rank1_bf16(acc, w, x, stride)
                acc = rank1_bf16(acc, w + 64, x + 4, stride)
                w += 128
                x += 8
            store_regs(acc, scores + 64 * t, 64)

    return add_scores


def weights() -> Any:
    """A device function: scores [n][16] become weights of values, [n / 4][16][4] u8, in place, and their units.

    Returns total + sum of probabilities.
    """
    from .simd import bc, bc_ld, device, ld, shl, st, sti, to_i, vexp2_down, vmax

    @device
    def weigh(p, top, total, rows, stride, n, unit, C, R):
        largest = bc(1e-30)
        for t in range(n):
            v = vexp2_down(ld(p + 64 * t) - top)
            total = total + v
            v = v * bc_ld(rows + t * stride + C + 2 * R)
            largest = vmax(largest, v)
            st(p + 64 * t, v)
        st(unit, largest * bc(1.0 / LEVELS))
        factor = bc(float(LEVELS)) / largest
        for t in range(0, n, 4):
            v = p + 64 * t
            low = to_i(ld(v) * factor) | shl(to_i(ld(v + 64) * factor), 8)
            high = to_i(ld(v + 128) * factor) | shl(to_i(ld(v + 192) * factor), 8)
            sti(p + 16 * t, low | shl(high, 16))
        return total

    return weigh


def values() -> Any:
    """A device function: outputs (n_lanes, n_out) times fades, plus weights times latents; in zip_rows's order.

    Meanwhile `fetch` bytes from `ahead` on are prefetched.
    """
    from numba import types

    from .microkernel import fold_regs, load_regs, mul_rows, rank1_ws8, store_regs, zeros_f, zeros_i
    from .simd import I8, I16, A, V, const_i, device, instruction, load, offset, prefetch, shuffle, store

    MH, N = (4, 4) if ISA.avx512 else (2, 2)

    @instruction(types.void, A, A, A)
    def zip_rows(b, row, stride, to):
        """64 values of four rows -> fours, as signed bytes; 4 of every 16 dimensions go to each of the registers."""
        rows = []
        for _ in range(4):
            rows.append(b.xor(load(b, row, V(I8, 64)), const_i(-128, 64, I8)))
            row = b.add(row, stride)

        def pairs(x, y, half):
            index = [16 * (i // 16) + 8 * half + i % 16 // 2 + 64 * (i % 2) for i in range(64)]
            return b.bitcast(shuffle(b, x, y, index), V(I16, 32))

        for k in range(4):
            x, y = pairs(rows[0], rows[1], k // 2), pairs(rows[2], rows[3], k // 2)
            index = [8 * (i // 8) + 4 * (k % 2) + i % 8 // 2 + 32 * (i % 2) for i in range(32)]
            store(b, shuffle(b, x, y, index), offset(b, to, 64 * k))

    @device
    def add_values(p, p_group, n_lanes, fades, units, rows, stride, n, ahead, fetch, zipped, out, C):
        width = (C + 63) // 64 * 64
        step = fetch // (width // 64 * (4 // N) * ((n_lanes + MH - 1) // MH) * (n // 4))
        for d in range(0, C, 64):
            for v in range(0, 4, N):
                for h in range(0, n_lanes, MH):
                    ints = zeros_i(MH, N)
                    w, x, row = zipped + 64 * v, p + h // 16 * p_group + h % 16 * 4, rows + d
                    if v == 0 and h == 0:  # stores beside products cost less than before them
                        for _ in range(n // 4):
                            prefetch(ahead)
                            ahead += step
                            zip_rows(row, stride, w)
                            ints = rank1_ws8(ints, w, x, 4)
                            row += 4 * stride
                            w += 256
                            x += 64
                    else:
                        for _ in range(n // 4):
                            prefetch(ahead)
                            ahead += step
                            ints = rank1_ws8(ints, w, x, 4)
                            w += 256
                            x += 64
                    to = out + (h * width + d + 16 * v) * 4
                    acc = mul_rows(load_regs(zeros_f(MH, N), to, width * 4), fades + 4 * h)
                    store_regs(fold_regs(acc, ints, units + 4 * h, 4), to, width * 4)

    return add_values


def order() -> Any:
    """A device function (x, n): outputs to the order of the latent, in place."""
    from numba import types

    from .simd import VF, A, concat, device, instruction, load, offset, shuffle, store

    @instruction(types.void, A)
    def unzip(b, x):
        four = concat(b, *[load(b, offset(b, x, 64 * k), VF) for k in range(4)])
        for k in range(4):
            store(b, shuffle(b, four, four, [16 * (i // 4) + 4 * k + i % 4 for i in range(16)]), offset(b, x, 64 * k))

    @device
    def in_order(x, n):
        for i in range(0, n, 64):
            unzip(x + 4 * i)

    return in_order
