"""mla_prefill under the shim, against K and V per head in float64; the rows are the CPU's."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances
from weights import BF16, F32, Q4_K, Q8_0, rows, weight

import cpu_kernels
from engine import reference
from gpu_kernels import mha, mla_prefill, prefill, upload
from gpu_kernels.attention import choose
from gpu_kernels.attention import kernels as decode_kernels
from gpu_kernels.device import CARDS, Limits
from gpu_kernels.k_cache import TYPES_K, row_bytes
from gpu_kernels.k_cache import kernels as row_kernels
from gpu_kernels.prefill import TOKENS

RANK, N_ROT, N_HEAD, NOPE, N_V = 128, 32, 2, 64, 32
F16 = 1
NMSE = {"f16": 1e-5, "bf16": 2e-4, "q8": 1e-3}
matmul = importlib.import_module("gpu_kernels.matmul")

instances(k for t in TYPES_K for n in (2, 18, 128)
          for k in decode_kernels(choose(CARDS[90], t, RANK, N_ROT, n), t, RANK, N_ROT))  # fmt: skip
instances([row_kernels("q8", RANK, N_ROT)["rotate_heads"]])
instances(matmul.matvec(t, n) for t in (F32, Q8_0) for n in (1, 4))
instances([matmul.VARIANTS[-1].kernel(CARDS[90], Q8_0)])
WIDENED = {"f16": (F32, F16, Q8_0, Q4_K), "bf16": (F32, BF16), "q8": (F32, Q8_0, Q4_K)}
instances(mha.widen_kernel(w, t) for t, some in WIDENED.items() for w in some)
SHAPES = [(t, RANK, N_ROT, NOPE, N_V) for t in TYPES_K] + [("f16", 256, 16, 96, 160), ("q8", 256, 16, 96, 160)]
instances(mha.expand_kernels(*shape)["expand"] for shape in SHAPES)
instances(mha.kernels(v, *shape)[0] for shape in SHAPES for v in mha.VARIANTS if v.m_tiles * shape[-1] <= 256)


def check(
    type_k: str, n_tok: int, n_past: int, nmse: float, uk: int = F32, uv: int = F32, order: int = -1,
    limits: Limits = CARDS[90], shape: tuple[int, int, int, int] = (RANK, N_ROT, NOPE, N_V), n_head: int = N_HEAD,
) -> ShimRun:  # fmt: skip
    rank, n_rot, nope, n_v = shape
    n_kv = n_past + n_tok
    kv_a, gamma = rows(n_kv, rank + n_rot, seed=5), np.exp(0.5 * rows(rank, seed=9))
    cache = np.full((n_kv + 3, row_bytes(type_k, rank, n_rot)), 0xFF, np.uint8)  # NaN
    still = np.concatenate([np.ones((n_kv, n_rot // 2)), np.zeros((n_kv, n_rot // 2))], 1).astype(np.float32)
    cpu = cpu_kernels.Run(1)
    cpu_kernels.k_store(cpu, kv_a, gamma, 1e-6, still, np.arange(n_kv, dtype=np.int32), cache, type_k, rank, n_rot)
    cpu.sync()
    w_uk, w_uv = weight(uk, n_head, rank, nope, seed=2), weight(uv, n_head, n_v, rank, seed=3)
    q, scale = rows(n_tok, n_head, nope + n_rot + 4)[:, :, : nope + n_rot], 1.3 / np.sqrt(nope + n_rot)
    out, run = np.full((n_tok, n_head, n_v), np.nan, np.float32), ShimRun(order, limits)
    mla_prefill(run, q, cache, type_k, n_past, rank, n_rot, scale, upload(run, w_uk), upload(run, w_uv), gamma, out)
    run.sync()
    latent = reference.rms_norm(kv_a[:, :rank].astype(np.float64), gamma.astype(np.float64), 1e-6)
    k = np.einsum("hcd,tc->thd", w_uk.values, latent)
    k = np.concatenate([k, np.broadcast_to(kv_a[:, None, rank:], (n_kv, n_head, n_rot))], axis=-1)
    v = np.einsum("hvc,tc->thv", w_uv.values, latent)
    expected = reference.attention(q.astype(np.float64), k, v, n_past + 1 + np.arange(n_tok), scale)
    assert_close(out, expected, rtol=np.inf, nmse=nmse)
    return run


def names(run: ShimRun) -> list[str]:
    return [kernel.name for kernel, *_ in run.launched]


# -------------------------------------------------------------------------------------------- absorbed, a few tokens


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mha, "pays", lambda n_tok, n_past, warpgroups: False)


@pytest.mark.parametrize("n_tok, n_past", [(1, 0), (9, 37), (TOKENS + 9, 3)])
@pytest.mark.parametrize("type_k", TYPES_K)
def test_absorbed_prefill_is_the_reference_s(absorbed: None, type_k: str, n_tok: int, n_past: int) -> None:
    assert "mla_split" in names(check(type_k, n_tok, n_past, NMSE[type_k]))


def test_quantised_up_projections(absorbed: None) -> None:
    check("f16", TOKENS + 1, 0, 1e-3, uk=Q8_0, uv=Q8_0)


def test_a_token_beyond_the_cache_is_refused() -> None:
    run = ShimRun()
    w_uk, w_uv = upload(run, weight(F32, N_HEAD, RANK, NOPE)), upload(run, weight(F32, N_HEAD, N_V, RANK))
    cache = np.zeros((8, row_bytes("f16", RANK, N_ROT)), np.uint8)
    q, out, gamma = rows(3, N_HEAD, NOPE + N_ROT), rows(3, N_HEAD, N_V), rows(RANK)
    with pytest.raises(ValueError, match="3 tokens after 6 in a cache of 8 rows"):
        mla_prefill(run, q, cache, "f16", 6, RANK, N_ROT, 1.0, w_uk, w_uv, gamma, out)


# --------------------------------------------------------------------------------------------------------- MHA mode


@pytest.fixture
def any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens in MHA mode too, and chunks of 128 rows."""
    monkeypatch.setattr(mha, "pays", lambda n_tok, n_past, warpgroups: True)
    monkeypatch.setattr(mha, "CHUNK_ROWS", (128, 128))
    monkeypatch.setattr(mha, "CHUNK_BYTES", 0)


@pytest.mark.parametrize("n_tok, n_past", [(1, 0), (17, 0), (65, 1), (130, 37), (1, 300), (17, 239), (128, 128)])
@pytest.mark.parametrize("type_k", TYPES_K)
def test_expanded_prefill_is_the_reference_s(any_number: None, type_k: str, n_tok: int, n_past: int) -> None:
    run = check(type_k, n_tok, n_past, NMSE[type_k])
    assert names(run).count("mha") == names(run).count("expand") == -(-(n_tok + n_past) // 128)


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("type_k", ["bf16", "q8"])
def test_any_order_of_threads(any_number: None, type_k: str, order: int) -> None:
    check(type_k, 70, 140, NMSE[type_k], order=order)


@pytest.mark.parametrize("type_k, uk, uv", [
    ("f16", F16, Q4_K), ("bf16", BF16, F32), ("f16", Q8_0, Q8_0), ("q8", Q8_0, Q4_K),
])  # fmt: skip
def test_weights_of_any_type(any_number: None, type_k: str, uk: int, uv: int) -> None:
    check(
        type_k,
        20,
        150,
        NMSE[type_k],
        uk,
        uv,
        shape=(256, 16, 96, 160) if Q4_K in (uk, uv) else (RANK, N_ROT, NOPE, N_V),
    )


@pytest.mark.parametrize("variant", mha.VARIANTS)
def test_every_variant(any_number: None, variant: mha.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mha, "choose", lambda *args: variant)
    check("f16", 150, 60, NMSE["f16"])


@pytest.mark.parametrize("n_sm", [1, 3, 80])
def test_any_number_of_splits(any_number: None, n_sm: int) -> None:
    limits = Limits("small", 90, n_sm, 227 << 10, 228 << 10)
    run = check("f16", 5, 280, NMSE["f16"], limits=limits)
    grids = {grid for kernel, grid, *_ in run.launched if kernel.name == "mha"}
    assert grids == {(N_HEAD, {1: 1, 3: 3, 80: 5}[n_sm])}


@pytest.mark.parametrize(
    "n_head, n_tok, splits", [(16, 512, 4), (20, 512, 3), (128, 512, 1), (16, 4096, 1), (40, 512, 3)]
)
def test_splits_fill_the_card(n_head: int, n_tok: int, splits: int) -> None:
    v = mha.Variant(2, 4, 64, 2)
    assert mha.geometry(CARDS[90], v, v.shared_bytes(192, 128), n_tok, n_head, 8192)[1] == splits


@pytest.mark.parametrize("n_head", [16, 20, 128])
def test_fewer_tokens_keep_no_more_sums(n_head: int) -> None:
    v = mha.Variant(2, 4, 64, 2)

    def kept(n_tok: int) -> int:
        return n_tok * mha.geometry(CARDS[90], v, v.shared_bytes(192, 128), n_tok, n_head, 8192)[1]

    assert max(map(kept, range(1, 2049))) <= 2048


@pytest.mark.parametrize(
    "n_tok, n_past, warpgroups, is_mha",
    [
        (17, 0, False, True),
        (17, 1500, False, False),
        (64, 8000, False, False),
        (65, 8000, False, True),
        (64, 0, True, True),
        (64, 8000, True, False),
        (65, 8000, True, False),
        (256, 30_000, True, True),
        (256, 100_000, True, False),
        (512, 1_000_000, True, True),
    ],
)
def test_the_form_is_chosen_by_the_numbers_of_tokens(n_tok: int, n_past: int, warpgroups: bool, is_mha: bool) -> None:
    assert mha.pays(n_tok, n_past, warpgroups) == is_mha


def test_a_short_prompt_after_many_rows_is_absorbed_where_wgmma_is() -> None:
    shape = ("q8", (16, 512, 128), 64, 128, 65, 8000)
    assert prefill.choose(CARDS[90], *shape) is None
    assert prefill.choose(CARDS[80], *shape) is not None


def test_turing_has_the_absorbed_form_alone() -> None:
    assert mha.choose(CARDS[75], 128, 64, 128, 512, 0) is None


@pytest.mark.parametrize("n_tok, n_past", [(512, 0), (512, 8192), (17, 100)])
@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("nope, n_rot, n_v", [(128, 64, 128), (64, 32, 64), (192, 64, 256), (64, 64, 128)])
def test_every_model_has_a_variant_on_every_card(
    sm: int, nope: int, n_rot: int, n_v: int, n_tok: int, n_past: int
) -> None:
    v = mha.choose(CARDS[sm], nope, n_rot, n_v, n_tok, n_past)
    assert v is not None and v.queries == (128 if n_past > n_tok > 64 and n_v <= 128 else 64)


@pytest.mark.parametrize(
    "n_kv, n_head, expected", [(5, 16, 128), (3000, 16, 3072), (100_000, 16, 16_384), (100_000, 128, 2048)]
)
def test_chunks_are_bounded(n_kv: int, n_head: int, expected: int) -> None:
    assert mha.chunk_rows(n_kv, n_head, 128, 128) == expected
