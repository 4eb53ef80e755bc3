"""mla_prefill against the oracle: K and V per head in float64, from the values that the cache rows hold."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from weights import F32, Q4_K, Q8_0, rows, weight

from cpu_kernels import prefill
from cpu_kernels.isa import ISA
from cpu_kernels.prefill import LANES, ROWS, mla_prefill
from cpu_kernels.quants import FORMATS
from cpu_kernels.threads import Run
from engine.reference import attention, expand, round_bf16

# sum(error²) / sum(out²). bf16 products have 0.3-0.5 % rms error here (2**-9 each of K, V, q and p): doubled, squared
NMSE = {"f32": 1e-11, "bf16": 1e-4}
PRECISION = {"f16": "f32", "bf16": ISA.panel, "q8": ISA.panel}
BLOCK = ROWS * prefill.KV_TILES
Q5_0, F16 = 6, 1


def hadamard(x: np.ndarray) -> np.ndarray:
    """Blocks of the largest power of two that divides the last axis, times an orthonormal Walsh-Hadamard matrix."""
    n = x.shape[-1] & -x.shape[-1]
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (x.reshape(*x.shape[:-1], -1, n) @ (h / np.sqrt(n))).reshape(x.shape)


def cache(type_k: str, n_kv: int, n_ctx: int, rank: int, n_rot: int, gamma: np.ndarray):
    """Bytes (n_ctx, row_stride), and the values (n_kv, rank + n_rot) of the first n_kv; the other rows hold NaN."""
    latent, rope = np.split(rows(n_kv, rank + n_rot, seed=5).astype(np.float64), [rank], axis=1)
    used = rank + 2 * n_rot + 4 if type_k == "q8" else 2 * (rank + n_rot)
    data = np.full((n_ctx, -(-used // 16) * 16), 0xFF, np.uint8)  # NaN in f16, bf16 and f32
    if type_k == "q8":
        rotated = hadamard(latent)
        scale = (np.abs(rotated).max(axis=1, keepdims=True) / 127).astype(np.float32)
        quants = np.rint(rotated / scale)
        rope = round_bf16(rope)
        data[:n_kv, :rank] = quants + 128
        data[:n_kv, rank : rank + 2 * n_rot] = bf16_bits(rope).view(np.uint8)
        data[:n_kv, rank + 2 * n_rot : used] = scale.view(np.uint8)
        return data, np.concatenate([hadamard(quants * scale) * gamma, rope], axis=1)
    values = np.concatenate([latent * gamma, rope], axis=1)
    if type_k == "f16":
        data[:n_kv, :used] = values.astype(np.float16).view(np.uint8)
        return data, values.astype(np.float16).astype(np.float64)
    data[:n_kv, :used] = bf16_bits(values).view(np.uint8)
    return data, round_bf16(values)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return (round_bf16(x).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def check(n_tok=70, n_past=0, type_k="f16", n_head=2, rank=64, nope=32, n_rot=32, n_v=32, uk=F32, uv=F32):
    """Compare with the oracle; returns the output."""
    gamma = np.exp(0.5 * rows(rank, seed=9))
    data, values = cache(type_k, n_past + n_tok, n_past + n_tok + 3, rank, n_rot, gamma)
    w_uk, w_uv = weight(uk, n_head, rank, nope, seed=2), weight(uv, n_head, n_v, rank, seed=3)
    w_uk.data, w_uk.values = w_uk.data, w_uk.values
    q = 1.5 * rows(n_tok, n_head, nope + n_rot + 5)[:, :, : nope + n_rot]
    kq_scale = 1.3 / np.sqrt(nope + n_rot)  # scores of unit spread and more

    def run(n_threads):
        out = np.full((n_tok, n_head, n_v + 3), np.nan, np.float32)
        run = Run(n_threads)
        run.workspace(1 << 20)[:] = 0xFF  # NaN
        mla_prefill(run, q, data, type_k, n_past, rank, n_rot, kq_scale, w_uk, w_uv, gamma, out[:, :, :n_v])
        run.sync()
        assert np.isnan(out[:, :, n_v:]).all()
        return out[:, :, :n_v]

    k, v = expand(values, np.swapaxes(w_uk.values, 1, 2), w_uv.values)
    expected = attention(q.astype(np.float64), k, v, n_past + 1 + np.arange(n_tok), kq_scale)
    out = run(2)
    assert_close(out, expected, rtol=np.inf, nmse=NMSE[PRECISION[type_k]])
    assert np.array_equal(out, run(1))
    return out


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
@pytest.mark.parametrize("n_past", [0, 1, 37, ROWS - 1, ROWS, BLOCK - 70, BLOCK + 5])
def test_past(type_k, n_past):
    check(n_past=n_past, type_k=type_k)


@pytest.mark.parametrize("type_k", ["f16", "bf16"])
@pytest.mark.parametrize("n_tok", [1, 2, 17, LANES - 1, LANES, LANES + 1, 200, BLOCK + 1])
def test_tokens(type_k, n_tok):
    check(n_tok=n_tok, n_past=11, type_k=type_k)


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 1, "rank": 96, "nope": 96, "n_rot": 32, "n_v": 64},
        {"n_head": 3, "rank": 288, "nope": 64, "n_rot": 32, "n_v": 96},
        {"n_head": 5, "rank": 320, "nope": 32, "n_rot": 96, "n_v": 160},
        {"n_head": 2, "rank": 512, "nope": 128, "n_rot": 64, "n_v": 128},
    ],
    ids=str,
)
def test_shapes(type_k, shape):
    check(n_past=150, type_k=type_k, **shape)


@pytest.mark.parametrize("type_k", ["f16", "bf16"])
@pytest.mark.parametrize("type_id", [pytest.param(f.type_id, id=f.name) for f in FORMATS.values()])
def test_types_of_weights(type_id, type_k):
    check(n_tok=33, n_head=2, rank=256, nope=256, n_v=32, type_k=type_k, uk=type_id, uv=type_id)


def test_the_two_weights_may_differ_in_type():
    check(uk=Q5_0, uv=Q4_K, rank=256, nope=32)


@pytest.mark.parametrize("type_k", ["f16", "bf16"])
def test_groups_of_heads_change_nothing(type_k, monkeypatch):
    sizes = {"n_past": 100, "type_k": type_k, "n_head": 5, "uk": Q8_0, "uv": F16}
    together = check(**sizes)
    monkeypatch.setattr(prefill, "WORKSPACE", 0)
    assert np.array_equal(together, check(**sizes))
    monkeypatch.setattr(prefill, "WORKSPACE", 400_000)
    assert np.array_equal(together, check(**sizes))


def test_weights_that_are_a_view_of_merged_ones():
    rank, nope, n_v = 64, 32, 64
    gamma = np.ones(rank, np.float32)
    data, values = cache("f16", 40, 41, rank, 32, gamma)
    merged = weight(Q8_0, 3, nope + n_v, rank)
    w_uk, w_uv = weight(F32, 3, rank, nope), weight(Q8_0, 3, n_v, rank)
    w_uv.data, w_uv.values = merged.data[:, nope:], merged.values[:, nope:]
    q, out = rows(40, 3, nope + 32), np.zeros((40, 3, n_v), np.float32)
    run = Run(2)
    mla_prefill(run, q, data, "f16", 0, rank, 32, 0.125, w_uk, w_uv, gamma, out)
    run.sync()
    k, v = expand(values, np.swapaxes(w_uk.values, 1, 2), w_uv.values)
    assert_close(out, attention(q.astype(np.float64), k, v, 1 + np.arange(40), 0.125), rtol=np.inf, nmse=1e-11)


def test_large_scores_of_any_sign():
    """The first row of each query dominates by hundreds, or all scores are far below 0."""
    for factor in (200.0, -200.0):
        data = np.zeros((130, 128), np.uint8)
        latent = np.zeros((130, 64), np.float16)
        latent[:, 32:] = np.linspace(1, 2, 130)[:, None]  # the rope part
        latent[:, :32] = rows(130, 32)
        data[:] = latent.view(np.uint8)
        w_uk, w_uv = weight(F32, 1, 32, 32), weight(F32, 1, 32, 32)
        q, out = np.full((130, 1, 64), factor / 32, np.float32), np.zeros((130, 1, 32), np.float32)
        run = Run(2)
        mla_prefill(run, q, data, "f16", 0, 32, 32, 1.0, w_uk, w_uv, np.ones(32, np.float32), out)
        run.sync()
        k, v = expand(latent.astype(np.float64), np.swapaxes(w_uk.values, 1, 2), w_uv.values)
        expected = attention(q.astype(np.float64), k, v, 1 + np.arange(130), 1.0)
        assert_close(out, expected, rtol=np.inf, nmse=1e-8)  # scores of 400 have an f32 error of 2e-5


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_past": 3}, "40 tokens after 3 in a cache of 42 rows"),
        ({"n_past": -1}, "40 tokens after -1"),
        ({"n_rot": 48}, "expected"),
        ({"type_k": "q4"}, "q4"),
        ({"kv_lora_rank": 32}, "expected"),
        ({"out": np.zeros((40, 2, 64), np.float32)}, "out is"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    args = {
        "q": rows(40, 2, 64), "rows": np.zeros((42, 192), np.uint8), "type_k": "f16", "n_past": 0, "kv_lora_rank": 64,
        "n_rot": 32, "kq_scale": 0.1, "w_uk": weight(F32, 2, 64, 32), "w_uv": weight(F32, 2, 32, 64),
        "norm_weight": np.ones(64, np.float32), "out": np.zeros((40, 2, 32), np.float32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        mla_prefill(Run(1), **{**args, **wrong})
