"""mla_decode in f32: rows are widened once, in L2, and serve scores and values of all lanes. See attention.py.

scores   lanes: 16 queries, panel [C + R][16]        broadcast: 24 rows
values   lanes: 32 dimensions of a row               broadcast: probabilities of 8 queries
"""

from typing import Any

from .isa import ISA


def padded_row(C: int, R: int) -> int:
    """Bytes of a packed query, a multiple of 64."""
    return (C + R) * 4


def panel_bytes(C: int, R: int) -> int:
    """[C + R][16] f32"""
    return 16 * padded_row(C, R)


def n_out(C: int) -> int:
    """Outputs of a lane."""
    return C


def packing() -> Any:
    """A device function (x, scale, row, _, C, R): a query, scaled."""
    from .simd import bc, device, ld, st

    @device
    def pack(x, scale, row, _, C, R):
        for i in range(0, C + R, 16):
            st(row + 4 * i, ld(x + 4 * i) * bc(scale))

    return pack


def scores() -> Any:
    """A device function: scores [n][16] f32 of a group; meanwhile `fetch` bytes from `ahead` on are prefetched."""
    from .microkernel import rank1_f32, store_regs, zeros_f
    from .simd import device, prefetch

    M = ISA.n_acc
    LINES = 2 if ISA.avx512 else 1

    @device
    def add_scores(panel, rows, stride, n, ahead, fetch, scores, C, R):
        step = fetch // (n // M * ((C + R) // 2))
        for t in range(0, n, M):
            acc = zeros_f(M, 1)
            w, x = panel, rows + t * stride
            for _ in range((C + R) // 2):
                for i in range(LINES):
                    prefetch(ahead + 64 * i)
                ahead += step
                acc = rank1_f32(acc, w, x, stride)
                acc = rank1_f32(acc, w + 64, x + 4, stride)
                w += 128
                x += 8
            store_regs(acc, scores + 64 * t, 64)

    return add_scores


def weights() -> Any:
    """A device function: scores [n][16] become probabilities, the weights of values, in place; returns total + sum."""
    from .simd import device, ld, st, vexp2_down

    @device
    def weigh(p, top, total, rows, stride, n, unit, C, R):
        for t in range(n):
            v = vexp2_down(ld(p + 64 * t) - top)
            total = total + v
            st(p + 64 * t, v)
        return total

    return weigh


def values() -> Any:
    """A device function: outputs (n_lanes, C) times fades, plus weights times latents."""
    from .microkernel import load_regs, mul_rows, rank1_f32, store_regs, zeros_f
    from .simd import device

    MH = 8 if ISA.avx512 else 2  # lanes of a block, which is two vectors of dimensions wide

    @device
    def add_values(p, p_group, n_lanes, fades, units, rows, stride, n, ahead, fetch, zipped, out, C):
        for d in range(0, C, 32):
            for h in range(0, n_lanes, MH):
                to = out + (h * C + d) * 4
                acc = mul_rows(load_regs(zeros_f(MH, 2), to, C * 4), fades + 4 * h)
                w, x = rows + 4 * d, p + h // 16 * p_group + h % 16 * 4
                for _ in range(n):
                    acc = rank1_f32(acc, w, x, 4)
                    w += stride
                    x += 64
                store_regs(acc, to, C * 4)

    return add_values


def order() -> Any:
    """A device function (x, n): outputs to the order of the latent, in place."""
    from .simd import device

    @device
    def in_order(x, n):
        pass

    return in_order
