"""mla_prefill on the GPU: causal attention of many tokens over the rows of the K-cache, in one of two forms.

    MHA mode    K and V of every head, expanded from the rows in chunks             mha.py
    absorbed    q_nope · W_UK -> mla_decode's kernel over rows -> · W_UV            this file, TOKENS at a time

The absorbed form reads nothing but the rows; it does three times the work at 4,096 tokens (1,088 against 352
multiplications a head, query and row at 512 + 64). It is for a few tokens after many, for Turing, and for odd widths.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import attention, k_cache, mha
from ._compile import kernel
from .check import rows_f32, steps
from .device import Limits
from .matmul import queue as multiply
from .matmul import scratch_bytes as multiply_bytes
from .quants import Weight
from .workspace import pieces

COPY_ROPE, COUNT_ROWS = kernel("prefill.cu", "copy_rope"), kernel("prefill.cu", "count_rows")
TOKENS = 64  # at a time: what bounds the scratch


def mla_prefill(
    run: Any, q: np.ndarray, rows: np.ndarray, type_k: str, n_past: int, kv_lora_rank: int, n_rot: int, kq_scale: float,
    w_uk: Any, w_uv: Any, norm_weight: np.ndarray, out: np.ndarray,
) -> None:  # fmt: skip
    """Causal attention of n_tok query tokens over rows 0 … n_past + n_tok - 1, which k_store has written.

    q            (n_tok, n_head, nope + n_rot) f32   [nope | rope], rotated, not absorbed
    rows         (n_ctx, row_stride) u8              laid out as type_k says
    kq_scale     1 / sqrt(nope + n_rot), times mscale² under YaRN
    w_uk, w_uv   weights (n_head, kv_lora_rank, nope), (n_head, Dv, kv_lora_rank) of any type
    norm_weight  (kv_lora_rank,) f32                 of the latent; read for q8 only
    out          (n_tok, n_head, Dv) f32

    Source: DeepSeek-V2 (arXiv 2405.04434) §2.1; online softmax as in FlashAttention (arXiv 2205.14135).
    """
    n_head, rank, nope = w_uk.shape
    n_v = w_uv.shape[1]
    n_tok, _, _ = rows_f32("q", q, 3, (q.shape[0], n_head, nope + n_rot))
    rows_f32("out", out, 3, (n_tok, n_head, n_v))
    rows_f32("norm_weight", norm_weight, 1, (kv_lora_rank,))
    k_cache.check_rows(rows, type_k, kv_lora_rank, n_rot)
    if rank != kv_lora_rank or w_uv.shape != (n_head, n_v, rank):
        raise ValueError(f"w_uk of {w_uk.shape} and w_uv of {w_uv.shape} for rows of {kv_lora_rank} + {n_rot}")
    if n_tok < 1 or n_past < 0 or n_past + n_tok > rows.shape[0]:
        raise ValueError(f"{n_tok} tokens after {n_past} in a cache of {rows.shape[0]} rows")
    variant = choose(run.limits, type_k, w_uk.shape, n_rot, n_v, n_tok, n_past)
    with run.within("prefill"):
        if variant is not None:
            mha.queue(run, variant, q, rows, type_k, n_past, rank, n_rot, kq_scale, w_uk, w_uv, norm_weight, out)
        else:
            _absorbed(run, q, rows, type_k, n_past, rank, n_rot, kq_scale, w_uk, w_uv, norm_weight, out)


def choose(
    limits: Limits, type_k: str, w_uk: tuple[int, ...], n_rot: int, n_v: int, n_tok: int, n_past: int
) -> mha.Variant | None:
    """The shape of MHA mode, where that is the faster form; None for the absorbed one. w_uk: the weight's shape."""
    n_head, rank, nope = w_uk
    variant = mha.choose(limits, nope, n_rot, n_v, n_tok, n_past)
    if variant is None:
        return None
    absorbed = attention.choose(limits, type_k, rank, n_rot, min(n_tok, TOKENS) * n_head)
    return variant if mha.pays(n_tok, n_past, isinstance(absorbed, attention.WarpgroupVariant)) else None


def _absorbed(
    run: Any, q: Any, rows: Any, type_k: str, n_past: int, rank: int, n_rot: int, kq_scale: float, w_uk: Weight,
    w_uv: Weight, norm_weight: Any, out: Any,
) -> None:  # fmt: skip
    n_tok, n_head, nope = len(q), w_uk.shape[0], w_uk.shape[2]
    most = min(n_tok, TOKENS)
    scratch_bytes = max(
        size
        for n in {most, n_tok % TOKENS or most}
        for size in (
            attention.scratch_bytes(run.limits, type_k, n * n_head, rows.shape[0], rank, n_rot),
            multiply_bytes(run, [w_uk], (n, n_head, nope)),
            multiply_bytes(run, [w_uv], (n, n_head, rank)),
        )
    )
    queries, latents, counts, scratch = pieces(
        run, 4 * most * n_head * (rank + n_rot), 4 * most * n_head * rank, 4 * most, scratch_bytes
    )
    for t in range(0, n_tok, TOKENS):
        n = min(TOKENS, n_tok - t)
        absorbed = queries.view(np.float32)[: n * n_head * (rank + n_rot)].reshape(n, n_head, rank + n_rot)
        latent = latents.view(np.float32)[: n * n_head * rank].reshape(n, n_head, rank)
        n_kv, some = counts.view(np.int32)[:n], q[t : t + n]
        of_rope, to_rope = some[:, :, nope:], absorbed[:, :, rank:]
        run.launch(COUNT_ROWS, (1,), 64, 0, (n_kv, n_past + t, n))
        _heads(run, w_uk, some[:, :, :nope], absorbed[:, :, :rank], scratch)
        run.launch(
            COPY_ROPE, (n * n_head,), 32, 0,
            (of_rope, *steps("q", of_rope), to_rope, *steps("queries", to_rope), n_head, n_rot),
        )  # fmt: skip
        if type_k == "q8":
            k_cache.rotate_query(run, absorbed, norm_weight, rank)
        attention.queue(run, absorbed, rows, type_k, n_kv, rank, n_rot, kq_scale, latent, scratch)
        if type_k == "q8":
            k_cache.unrotate_output(run, latent, norm_weight)
        _heads(run, w_uv, latent, out[t : t + n], scratch)


def _heads(run: Any, w: Weight, x: Any, out: Any, scratch: Any) -> None:
    multiply(run, [w], x, [out], False, scratch[: multiply_bytes(run, [w], x.shape)])
