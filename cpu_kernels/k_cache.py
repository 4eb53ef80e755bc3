"""Writing rows of the K-cache, and the rotation that type_k q8 keeps its latent under.

    kv_a of a token      [ latent C | k_rope R ] f32, as attn_kv_a_mqa gives it
    16-bit row           [ γ · ĉ | rope(k_rope) ]                       ĉ = latent / rms
    q8 row               [ int8 of H·ĉ, stored + 128 | rope(k_rope) bf16 | f32 scale ]

H is an orthonormal Walsh-Hadamard matrix (of the largest power of two that divides C, block by block): rotated, all
columns have the same size, so one scale per row is enough. γ is the norm's weight; leaving it out of the row keeps its
uneven columns out of the int8. Both are undone exactly: q·(γ⊙ĉ) = H(γ⊙q) · Hĉ, and sum p·(γ⊙ĉ) = γ ⊙ H(sum p·Hĉ).
"""

from typing import Any

import numpy as np

from ._jit import f32, kernel
from .check import array, rows_f32
from .rope import rotation


def hadamard() -> Any:
    """A device function (x, n): n f32 at x are multiplied by H, in place; n a multiple of 16. For kernel factories."""
    from .simd import VF, F, bc, device, fma_, instruction, ir, ld, shuffle, st

    @instruction(F, F)
    def butterflies(b, v):
        """Of lanes that are 1, 2, 4 and 8 apart."""
        for h in (1, 2, 4, 8):
            sign = ir.Constant(VF, [-1.0 if lane & h else 1.0 for lane in range(16)])
            v = fma_(b, v, sign, shuffle(b, v, v, [lane ^ h for lane in range(16)]))
        return v

    @device
    def transform(x, n):
        block = n & -n
        factor = bc(block**-0.5)
        for i in range(0, 4 * n, 64):
            st(x + i, butterflies(ld(x + i) * factor))
        for start in range(0, n, block):
            h = 16
            while h < block:
                for i in range(start, start + block, 2 * h):
                    for j in range(i, i + h, 16):
                        p, q = x + 4 * j, x + 4 * (j + h)
                        u, v = ld(p), ld(q)
                        st(p, u + v)
                        st(q, u - v)
                h *= 2

    return transform


@kernel
def store_row(type_k, neox):
    """One token a tile."""
    from .simd import bc, bci, fma, hmax, hsum, ld, ld_i32, st, st_i8, st_scalar, to_i, vabs, vmax

    rotate, transform, st_16 = rotation(neox), hadamard(), narrow_store(type_k)

    def body(tile, scratch, kv_a, stride, weight, eps: f32, cos_sin, cos_sin_stride,
             positions, rows, row_stride, C, R):  # fmt: skip
        kv_a += tile * stride
        row = rows + ld_i32(positions + 4 * tile) * row_stride
        acc = bc(0.0)
        for i in range(0, C, 16):
            v = ld(kv_a + 4 * i)
            acc = fma(v, v, acc)
        factor = bc((hsum(acc) / C + eps) ** -0.5)
        rope = scratch + 4 * C
        rotate(kv_a + 4 * C, cos_sin + tile * cos_sin_stride, rope, R)
        if type_k == "q8":
            for i in range(0, C, 16):
                st(scratch + 4 * i, ld(kv_a + 4 * i) * factor)
            transform(scratch, C)
            top = bc(1e-30)
            for i in range(0, C, 16):
                top = vmax(top, vabs(ld(scratch + 4 * i)))
            scale = hmax(top) / 127.0
            for i in range(0, C, 16):
                v = to_i(ld(scratch + 4 * i) * bc(1.0 / scale))
                st_i8(row + i, v + bci(128))
            row += C
            st_scalar(row + 2 * R, scale)
        else:
            for i in range(0, C, 16):
                st_16(row + 2 * i, ld(kv_a + 4 * i) * factor * ld(weight + 4 * i))
            row += 2 * C
        for i in range(0, R, 16):
            st_16(row + 2 * i, ld(rope + 4 * i))

    return body


def narrow_store(type_k: str) -> Any:
    """A device function (address, 16 f32): stores them in the 16 bits of a type's rope. For kernel factories."""
    from .simd import bc, device, st_bf16, st_f16, vmax, vmin

    @device
    def store_f16(a, v):
        st_f16(a, vmax(vmin(v, bc(65504.0)), bc(-65504.0)))

    @device
    def store_bf16(a, v):
        st_bf16(a, v)

    return store_f16 if type_k == "f16" else store_bf16


def widening(type_k: str) -> Any:
    """A device function (row, out, C, R): a cache row -> C + R f32. For kernel factories."""
    from .simd import bc, device, ld_bf16, ld_f16, ld_scalar, ld_u8_16, st

    @device
    def widen(row, out, C, R):
        if type_k == "q8":
            scale = bc(ld_scalar(row + C + 2 * R))
            for i in range(0, C, 16):
                st(out + 4 * i, (ld_u8_16(row + i) - bc(128.0)) * scale)
            for i in range(0, R, 16):
                st(out + 4 * (C + i), ld_bf16(row + C + 2 * i))
        else:
            for i in range(0, C + R, 16):
                st(out + 4 * i, ld_f16(row + 2 * i) if type_k == "f16" else ld_bf16(row + 2 * i))

    return widen


@kernel
def rotate_head(inverse):
    """One token's head a tile."""
    from .simd import ld, st

    transform = hadamard()

    def body(tile, scratch, x, x_tok, x_head, n_head, weight, n):
        x += tile // n_head * x_tok + tile % n_head * x_head
        if inverse:
            transform(x, n)
        for i in range(0, n, 16):
            st(x + 4 * i, ld(x + 4 * i) * ld(weight + 4 * i))
        if not inverse:
            transform(x, n)

    return body


def k_store(
    run: Any, kv_a: np.ndarray, norm_weight: np.ndarray, eps: float, cos_sin: np.ndarray, positions: np.ndarray,
    rows: np.ndarray, type_k: str, kv_lora_rank: int, n_rot: int, neox: bool = False,
) -> None:  # fmt: skip
    """Write row positions[t] of rows (n_ctx, row_stride) u8 from kv_a (n_tok, kv_lora_rank + n_rot) f32.

    norm_weight (kv_lora_rank,) f32; cos_sin (n_tok, n_rot) f32; positions (n_tok,) int32, checked by the caller
    """
    n_tok, _ = rows_f32("kv_a", kv_a, 2, (len(positions), kv_lora_rank + n_rot))
    _check(rows, type_k, kv_lora_rank, n_rot)
    rows_f32("norm_weight", norm_weight, 1, (kv_lora_rank,))
    rows_f32("cos_sin", cos_sin, 2, (n_tok, n_rot))
    array("positions", positions, np.int32, 1)
    run.launch(
        store_row(type_k=type_k, neox=neox),
        n_tok,
        (kv_a, kv_a.strides[0], norm_weight, float(eps), cos_sin, cos_sin.strides[0], positions)
        + (rows, rows.strides[0], kv_lora_rank, n_rot),
    )


@kernel
def turn_row(type_k, neox):
    """One row a tile: its rope part, from a copy in 16 bits."""
    from .simd import ld, ld_bf16, ld_f16, st

    rotate, st_16 = rotation(neox), narrow_store(type_k)

    def body(tile, scratch, rope, cos_sin, cos_sin_stride, rows, row_stride, offset, R):
        rope += tile * 2 * R
        row = rows + tile * row_stride + offset
        for i in range(0, R, 16):
            st(scratch + 4 * i, ld_f16(rope + 2 * i) if type_k == "f16" else ld_bf16(rope + 2 * i))
        rotate(scratch, cos_sin + tile * cos_sin_stride, scratch, R)
        for i in range(0, R, 16):
            st_16(row + 2 * i, ld(scratch + 4 * i))

    return body


def k_shift(
    run: Any, rope: np.ndarray, cos_sin: np.ndarray, rows: np.ndarray, type_k: str, kv_lora_rank: int, n_rot: int,
    neox: bool = False,
) -> None:  # fmt: skip
    """The rope part of the first n of rows (n_ctx, row_stride) u8 = rope (n, n_rot) u16, turned.

    cos_sin (n, n_rot) f32; rope is in the 16 bits that rows have it in; the latent is neither read nor written.
    """
    n, _ = array("rope", rope, np.uint16, 2)
    _check(rows, type_k, kv_lora_rank, n_rot)
    rows_f32("cos_sin", cos_sin, 2, (n, n_rot))
    if rope.shape != (n, n_rot) or n > len(rows):
        raise ValueError(f"rope is {rope.shape} for {len(rows)} rows with {n_rot} rope values")
    offset = kv_lora_rank if type_k == "q8" else 2 * kv_lora_rank
    args = (np.ascontiguousarray(rope), cos_sin, cos_sin.strides[0], rows, rows.strides[0], offset, n_rot)
    run.launch(turn_row(type_k=type_k, neox=neox), n, args)


def rotate_query(run: Any, q: np.ndarray, norm_weight: np.ndarray, kv_lora_rank: int) -> None:
    """The latent part of q (n_tok, n_head, kv_lora_rank + n_rot) f32 becomes H(γ ⊙ q), in place; for type_k q8."""
    n_tok, n_head, _ = rows_f32("q", q, 3)
    rows_f32("norm_weight", norm_weight, 1, (kv_lora_rank,))
    args = (q, *q.strides[:2], n_head, norm_weight, kv_lora_rank)
    run.launch(rotate_head(inverse=False), n_tok * n_head, args)


def unrotate_output(run: Any, x: np.ndarray, norm_weight: np.ndarray) -> None:
    """x (n_tok, n_head, kv_lora_rank) f32 becomes γ ⊙ H(x), in place; for type_k q8."""
    n_tok, n_head, rank = rows_f32("x", x, 3)
    rows_f32("norm_weight", norm_weight, 1, (rank,))
    run.launch(rotate_head(inverse=True), n_tok * n_head, (x, *x.strides[:2], n_head, norm_weight, rank))


def _check(rows: np.ndarray, type_k: str, kv_lora_rank: int, n_rot: int) -> None:
    array("rows", rows, np.uint8, 2)
    used = kv_lora_rank + 2 * n_rot + 4 if type_k == "q8" else 2 * (kv_lora_rank + n_rot)
    if type_k not in ("f16", "bf16", "q8") or rows.shape[1] < used or kv_lora_rank % 32 or n_rot % 16:
        raise ValueError(f"rows of {rows.shape[1]} bytes for {type_k} {kv_lora_rank} + {n_rot}")
