"""mla_prefill under the shim, against K and V per head in float64; the rows are the CPU's."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances
from weights import F32, Q8_0, rows, weight

import cpu_kernels
from engine import reference
from gpu_kernels import mla_prefill, upload
from gpu_kernels.attention import choose
from gpu_kernels.attention import kernels as decode_kernels
from gpu_kernels.device import CARDS
from gpu_kernels.k_cache import TYPES_K, row_bytes
from gpu_kernels.k_cache import kernels as row_kernels
from gpu_kernels.prefill import TOKENS

RANK, N_ROT, N_HEAD, NOPE, N_V = 128, 32, 2, 64, 32
matmul = importlib.import_module("gpu_kernels.matmul")

instances(k for t in TYPES_K for n in (2, 18, 128)
          for k in decode_kernels(choose(CARDS[90], t, RANK, N_ROT, n), t, RANK, N_ROT))  # fmt: skip
instances([row_kernels("q8", RANK, N_ROT)["rotate_heads"]])
instances(matmul.matvec(t, n) for t in (F32, Q8_0) for n in (1, 4))
instances([matmul.VARIANTS[-1].kernel(CARDS[90], Q8_0)])


def check(type_k: str, n_tok: int, n_past: int, nmse: float, uk: int = F32, uv: int = F32) -> None:
    n_kv = n_past + n_tok
    kv_a, gamma = rows(n_kv, RANK + N_ROT, seed=5), np.exp(0.5 * rows(RANK, seed=9))
    cache = np.full((n_kv + 3, row_bytes(type_k, RANK, N_ROT)), 0xFF, np.uint8)  # NaN
    still = np.concatenate([np.ones((n_kv, N_ROT // 2)), np.zeros((n_kv, N_ROT // 2))], 1).astype(np.float32)
    run = cpu_kernels.Run(1)
    cpu_kernels.k_store(run, kv_a, gamma, 1e-6, still, np.arange(n_kv, dtype=np.int32), cache, type_k, RANK, N_ROT)
    run.sync()
    w_uk, w_uv = weight(uk, N_HEAD, RANK, NOPE, seed=2), weight(uv, N_HEAD, N_V, RANK, seed=3)
    q, scale = rows(n_tok, N_HEAD, NOPE + N_ROT + 4)[:, :, : NOPE + N_ROT], 1.3 / np.sqrt(NOPE + N_ROT)
    out, run = np.full((n_tok, N_HEAD, N_V), np.nan, np.float32), ShimRun(-1)
    mla_prefill(run, q, cache, type_k, n_past, RANK, N_ROT, scale, upload(run, w_uk), upload(run, w_uv), gamma, out)
    latent = reference.rms_norm(kv_a[:, :RANK].astype(np.float64), gamma.astype(np.float64), 1e-6)
    k = np.einsum("hcd,tc->thd", w_uk.values, latent)
    k = np.concatenate([k, np.broadcast_to(kv_a[:, None, RANK:], (n_kv, N_HEAD, N_ROT))], axis=-1)
    v = np.einsum("hvc,tc->thv", w_uv.values, latent)
    expected = reference.attention(q.astype(np.float64), k, v, n_past + 1 + np.arange(n_tok), scale)
    assert_close(out, expected, rtol=np.inf, nmse=nmse)


@pytest.mark.parametrize("n_tok, n_past", [(1, 0), (9, 37), (TOKENS + 9, 3)])
@pytest.mark.parametrize("type_k, nmse", [("f16", 1e-5), ("bf16", 2e-4), ("q8", 1e-3)])
def test_prefill_is_the_reference_s(type_k: str, nmse: float, n_tok: int, n_past: int) -> None:
    check(type_k, n_tok, n_past, nmse)


def test_quantised_up_projections() -> None:
    check("f16", TOKENS + 1, 0, 1e-3, uk=Q8_0, uv=Q8_0)


def test_a_token_beyond_the_cache_is_refused() -> None:
    run = ShimRun()
    w_uk, w_uv = upload(run, weight(F32, N_HEAD, RANK, NOPE)), upload(run, weight(F32, N_HEAD, N_V, RANK))
    cache = np.zeros((8, row_bytes("f16", RANK, N_ROT)), np.uint8)
    q, out, gamma = rows(3, N_HEAD, NOPE + N_ROT), rows(3, N_HEAD, N_V), rows(RANK)
    with pytest.raises(ValueError, match="3 tokens after 6 in a cache of 8 rows"):
        mla_prefill(run, q, cache, "f16", 6, RANK, N_ROT, 1.0, w_uk, w_uv, gamma, out)
