"""Rows of the K-cache on the GPU: the same bytes as the CPU's. cuda/k_cache.cu draws them and has the arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._compile import Kernel, kernel
from .check import array, rows_f32, steps
from .stream import wide

FILE = "k_cache.cu"
TYPES_K = ("f16", "bf16", "q8")  # a kernel's TYPE_K is the index
THREADS = 128


def row_bytes(type_k: str, kv_lora_rank: int, n_rot: int) -> int:
    """Bytes that a row uses, in whole 16."""
    used = kv_lora_rank + 2 * n_rot + 4 if type_k == "q8" else 2 * (kv_lora_rank + n_rot)
    return -(-used // 16) * 16


def kernels(type_k: str, kv_lora_rank: int, n_rot: int) -> dict[str, Kernel]:
    """k_store, k_shift and rotate_heads of a layout."""
    defines = {"KV_LORA_RANK": kv_lora_rank, "N_ROT": n_rot, "TYPE_K": TYPES_K.index(type_k)}
    return {name: kernel(FILE, name, defines) for name in ("k_store", "k_shift", "rotate_heads")}


def k_store(
    run: Any, kv_a: np.ndarray, norm_weight: np.ndarray, eps: float, cos_sin: np.ndarray, positions: np.ndarray,
    rows: np.ndarray, type_k: str, kv_lora_rank: int, n_rot: int, neox: bool = False,
) -> None:  # fmt: skip
    """Write row positions[t] of rows (n_ctx, row_stride) u8 from kv_a (n_tok, kv_lora_rank + n_rot) f32.

    norm_weight (kv_lora_rank,) f32; cos_sin (n_tok, n_rot) f32; positions (n_tok,) int32, checked by the caller
    """
    n_tok, _ = rows_f32("kv_a", kv_a, 2, (len(positions), kv_lora_rank + n_rot))
    check_rows(rows, type_k, kv_lora_rank, n_rot)
    rows_f32("norm_weight", norm_weight, 1, (kv_lora_rank,))
    rows_f32("cos_sin", cos_sin, 2, (n_tok, n_rot))
    array("positions", positions, np.int32, 1)
    run.launch(
        kernels(type_k, kv_lora_rank, n_rot)["k_store"], (n_tok,), THREADS, 4 * (kv_lora_rank + n_rot + THREADS // 32),
        (kv_a, *steps("kv_a", kv_a), norm_weight, float(eps), cos_sin, *steps("cos_sin", cos_sin), positions,
         rows, wide(rows.strides[0]), int(neox)),
    )  # fmt: skip


def k_shift(
    run: Any, rope: np.ndarray, cos_sin: np.ndarray, rows: np.ndarray, type_k: str, kv_lora_rank: int, n_rot: int,
    neox: bool = False,
) -> None:  # fmt: skip
    """The rope part of the first n rows (n_ctx, row_stride) u8 = rope (n, n_rot) u16, turned by cos_sin (n, n_rot) f32.

    rope is contiguous, in the 16 bits that rows have it in; the latent is neither read nor written.
    """
    n, _ = array("rope", rope, np.uint16, 2)
    check_rows(rows, type_k, kv_lora_rank, n_rot)
    rows_f32("cos_sin", cos_sin, 2, (n, n_rot))
    if rope.shape != (n, n_rot) or n > len(rows) or rope.strides[0] != 2 * n_rot:
        raise ValueError(
            f"rope is {rope.shape} with strides {rope.strides} for {len(rows)} rows of {n_rot} rope values"
        )
    if n:
        run.launch(
            kernels(type_k, kv_lora_rank, n_rot)["k_shift"], (n,), 32, 0,
            (rope, cos_sin, *steps("cos_sin", cos_sin), rows, wide(rows.strides[0]), int(neox)),
        )  # fmt: skip


def rotate_query(run: Any, q: np.ndarray, norm_weight: np.ndarray, kv_lora_rank: int) -> None:
    """The latent part of q (n_tok, n_head, kv_lora_rank + n_rot) f32 becomes H(γ ⊙ q), in place; for type_k q8."""
    rows_f32("q", q, 3)
    _rotate(run, q, norm_weight, kv_lora_rank, q.shape[2] - kv_lora_rank, inverse=False)


def unrotate_output(run: Any, x: np.ndarray, norm_weight: np.ndarray) -> None:
    """x (n_tok, n_head, kv_lora_rank) f32 becomes γ ⊙ H(x), in place; for type_k q8."""
    rows_f32("x", x, 3)
    _rotate(run, x, norm_weight, x.shape[2], 0, inverse=True)


def _rotate(run: Any, x: np.ndarray, weight: np.ndarray, rank: int, n_rot: int, inverse: bool) -> None:
    rows_f32("norm_weight", weight, 1, (rank,))
    n_tok, n_head, _ = x.shape
    run.launch(
        kernels("q8", rank, n_rot)["rotate_heads"], (n_tok * n_head,), THREADS, 4 * rank,
        (x, *steps("x", x), n_head, weight, int(inverse)),
    )  # fmt: skip


def check_rows(rows: np.ndarray, type_k: str, kv_lora_rank: int, n_rot: int) -> None:
    """ValueError unless rows (n_ctx, row_stride) u8 hold this layout, each row at a multiple of 16 bytes."""
    array("rows", rows, np.uint8, 2)
    if type_k not in TYPES_K or rows.shape[1] < row_bytes(type_k, kv_lora_rank, n_rot) or rows.strides[0] % 16:
        raise ValueError(f"rows of {rows.shape[1]} bytes for {type_k} {kv_lora_rank} + {n_rot}")
    if kv_lora_rank % 128 or n_rot % 16:
        raise ValueError(f"rows of {kv_lora_rank} + {n_rot} values; the GPU takes multiples of 128 + 16; use the CPU")
