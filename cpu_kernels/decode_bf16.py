"""mla_decode in bf16: dot products of pairs, sums in f32. See attention.py.

    scores   lanes: 16 queries, panel [(C + R) / 2][16][2]           broadcast: 24 rows, where they lie in the cache
    values   lanes: 16 dimensions, two rows zipped, in registers     broadcast: probabilities of 16 queries

A pair of rows is zipped where it is multiplied, once for each group of queries: shuffles run beside products. To store
the zipped rows for all groups costs Zen 4 two cycles a register: 16 heads, one thread, 128 + 32, 256 + 64 and 512 + 64
had 73, 76 and 77 % of the peak, and have 78, 84 and 84. To zip for 8 queries at a time gains nothing.
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
    """A device function: scores [n][16] f32 of a group; meanwhile `fetch` bytes from `ahead` on are prefetched."""
    from .microkernel import rank1_bf16, store_regs, zeros_f
    from .simd import device, prefetch

    M = ISA.n_acc

    @device
    def add_scores(panel, rows, stride, n, ahead, fetch, scores, C, R):
        step = fetch // (n // M * ((C + R) // 4))
        for t in range(0, n, M):
            acc = zeros_f(M, 1)
            w, x = panel, rows + t * stride
            for _ in range((C + R) // 4):
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
    """A device function: scores [n][16] become weights of values, [n / 2][16][2] bf16, in place.

    Returns total + sum of probabilities.
    """
    from .simd import device, ld, pair_bf16, sti, vexp2_down

    @device
    def weigh(p, top, total, rows, stride, n, unit, C, R):
        for t in range(0, n, 2):
            v0 = vexp2_down(ld(p + 64 * t) - top)
            v1 = vexp2_down(ld(p + 64 * t + 64) - top)
            total = total + v0
            total = total + v1
            sti(p + 32 * t, pair_bf16(v0, v1))
        return total

    return weigh


def values() -> Any:
    """A device function: outputs (n_lanes, C) times fades, plus weights times latents.

    Meanwhile `fetch` bytes from `ahead` on are prefetched.
    """
    from .microkernel import load_regs, mul_rows, rank1_of_bf16, store_regs, zeros_f
    from .simd import I16, VI, A, I, V, device, instruction, load, prefetch, shuffle

    @instruction(I, A, A)
    def zip_rows(b, row, stride):
        """16 values of two rows as pairs"""
        x, y = load(b, row, V(I16, 16)), load(b, b.add(row, stride), V(I16, 16))
        return b.bitcast(shuffle(b, x, y, [i // 2 + 16 * (i % 2) for i in range(32)]), VI)

    @device
    def add_values(p, p_group, n_lanes, fades, units, rows, stride, n, ahead, fetch, zipped, out, C):
        step = fetch // ((n_lanes + 7) // 16 * (C // 16) * (n // 2))
        for h in range(0, n_lanes, 16):  # a group
            weights = p + h // 16 * p_group
            if n_lanes - h > 8:
                for d in range(0, C, 16):
                    to = out + (h * C + d) * 4
                    acc = mul_rows(load_regs(zeros_f(16, 1), to, C * 4), fades + 4 * h)
                    row, x = rows + 2 * d, weights
                    for _ in range(n // 2):
                        prefetch(ahead)
                        ahead += step
                        acc = rank1_of_bf16(acc, zip_rows(row, stride), x, 4)
                        row += 2 * stride
                        x += 64
                    store_regs(acc, to, C * 4)
            else:  # half a group, as the last one of 40 heads
                for d in range(0, C, 32):
                    to = out + (h * C + d) * 4
                    low = mul_rows(load_regs(zeros_f(8, 1), to, C * 4), fades + 4 * h)
                    high = mul_rows(load_regs(zeros_f(8, 1), to + 64, C * 4), fades + 4 * h)
                    row, x = rows + 2 * d, weights
                    for _ in range(n // 2):
                        prefetch(ahead)
                        ahead += step
                        low = rank1_of_bf16(low, zip_rows(row, stride), x, 4)
                        high = rank1_of_bf16(high, zip_rows(row + 32, stride), x, 4)
                        row += 2 * stride
                        x += 64
                    store_regs(low, to, C * 4)
                    store_regs(high, to + 64, C * 4)

    return add_values


def order() -> Any:
    """A device function (x, n): outputs to the order of the latent, in place: they are."""
    from .simd import device

    @device
    def in_order(x, n):
        pass

    return in_order
