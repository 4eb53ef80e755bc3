"""matmul, matmul_heads and embed_rows under the shim, against float64 products of gguf's dequantised weights."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances
from weights import BF16, F32, Q4_K, Q8_0, rows, weight

from gpu_kernels import embed_rows, matmul, matmul_heads, upload
from gpu_kernels._compile import kernel
from gpu_kernels.device import CARDS
from gpu_kernels.quants import FORMATS

module = importlib.import_module("gpu_kernels.matmul")  # whose name in the package is the function's
ALL = [pytest.param(f.type_id, id=f.name) for f in FORMATS.values()]
# Of sum(error²) to sum(out²). int8 activations with a scale per 32 err by 0.6 % rms: doubled and squared
# bf16 products of many tokens by 0.24 %
NMSE_INT8, NMSE_BF16, NMSE_F32 = 1.5e-4, 2.5e-5, 1e-12

instances(module.matvec(f, n) for f in FORMATS for n in (1, 4))
instances(v.kernel(CARDS[90], f) for v in module.VARIANTS for f in FORMATS if f)
instances(v.kernel(CARDS[75], Q8_0) for v in module.VARIANTS[-1:])
instances(kernel("embed.cu", "embed_rows", {"TYPE_ID": f}) for f in FORMATS)


def nmse(type_id: int, n_tok: int = 1) -> float:
    if module.takes_gemm(CARDS[90], type_id, n_tok):
        return NMSE_BF16
    return NMSE_F32 if FORMATS[type_id].is_float else NMSE_INT8


def multiplied(w: Any, x: np.ndarray, variant: Any, order: int, limits: Any = CARDS[90]) -> np.ndarray:
    """matmul by one shape of gemm.cu."""
    out, run = np.full((len(x), 1, w.shape[0]), np.nan, np.float32), ShimRun(order, limits)
    uploaded, x = upload(run, w), x[:, None]
    narrowed = run.workspace(module.narrow_bytes([uploaded], len(x), x.shape[2]))
    module.narrow(run, x, narrowed)
    module.launch_gemm(run, uploaded, narrowed, x.shape[2], out, variant)
    return out[:, 0]


def product(w: Any, x: np.ndarray, order: int = 0) -> np.ndarray:
    out, run = np.full((len(x), w.shape[0]), np.nan, np.float32), ShimRun(order)
    matmul(run, upload(run, w), x, out)
    return out


@pytest.mark.parametrize("type_id", ALL)
@pytest.mark.parametrize("n_tok", [1, 6, 17])
def test_every_type(type_id: int, n_tok: int) -> None:
    w, x = weight(type_id, 37, 768), rows(n_tok, 768)
    assert_close(product(w, x, -1), x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=nmse(type_id, n_tok))


@pytest.mark.parametrize("n_tok", [1, 16, 70])
@pytest.mark.parametrize("k", [32, 64, 96, 352, 1408])
@pytest.mark.parametrize("type_id", [F32, Q8_0])
def test_odd_sizes(type_id: int, k: int, n_tok: int) -> None:
    w, x = weight(type_id, 71, k), rows(n_tok, k)
    assert_close(product(w, x), x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=nmse(type_id, n_tok))


@pytest.mark.parametrize("order", [1, 2, -1])
@pytest.mark.parametrize("type_id", [BF16, Q4_K])
@pytest.mark.parametrize("variant", module.VARIANTS, ids=lambda v: f"{v.tokens}x{v.rows}x{v.depth}x{v.stages}")
def test_every_shape_of_block_in_several_orders_of_threads(variant: Any, type_id: int, order: int) -> None:
    n_rows, n_tok, k = variant.rows + 7, variant.tokens + 3, 768
    w, x = weight(type_id, n_rows, k), rows(n_tok, k)
    found = multiplied(w, x, variant, order)
    assert_close(found, x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=NMSE_BF16)


@pytest.mark.parametrize("type_id", [t for t in ALL if t.id not in ("F32", "BF16", "Q4_K")])
@pytest.mark.parametrize("variant", module.VARIANTS, ids=lambda v: f"{v.tokens}x{v.rows}x{v.depth}x{v.stages}")
def test_every_shape_of_block_multiplies_every_type(variant: Any, type_id: int) -> None:
    w, x = weight(type_id, 40, 512), rows(18, 512)
    found = multiplied(w, x, variant, -1)
    assert_close(found, x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=NMSE_BF16)


@pytest.mark.parametrize("type_id", [BF16, Q8_0])
@pytest.mark.parametrize("n_splits", [2, 3, 8])
@pytest.mark.parametrize("k", [96, 1408])
def test_splits_of_k_add_up(k: int, n_splits: int, type_id: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "choose", lambda *_: (module.VARIANTS[-1], n_splits))
    w, x = weight(type_id, 3, 37, k), rows(17, 3, k)
    out, run = np.full((17, 3, 37), np.nan, np.float32), ShimRun(-1)
    matmul_heads(run, upload(run, w), x, out)
    expected = np.einsum("hmk,thk->thm", w.values, x.astype(np.float64))
    assert_close(out, expected, rtol=np.inf, nmse=NMSE_BF16)
    assert any(kernel == module.ADD_SPLITS for kernel, *_ in run.launched)


SHAPES = [(512, 8192, 1, 4096), (512, 2048, 1, 2048), (64, 8192, 1, 4096), (64, 2048, 1, 2048), (20, 2048, 1, 2048),
          (64, 128, 16, 512), (64, 512, 16, 128), (4096, 576, 1, 2048), (17, 33, 1, 32)]  # fmt: skip


@pytest.mark.parametrize("limits", CARDS.values(), ids=lambda card: card.name)
def test_a_block_fits_the_card_and_a_large_product_fills_it(limits: Any) -> None:
    for type_id in FORMATS:
        if type_id == F32:
            continue
        for n_tok, m, n_head, k in SHAPES:
            variant, n_splits = module.choose(limits, type_id, n_tok, m, n_head, k)
            assert variant.shared_bytes(type_id) <= limits.shared_per_block
            assert 1 <= n_splits <= variant.most_splits(k)
        assert module.choose(limits, type_id, 4096, 8192, 1, 4096)[0].tokens == (128 if limits.has_bf16 else 64)


def test_every_variant_is_some_card_s_choice() -> None:
    taken = {module.choose(card, t, n_tok, m, n_head, k)[0]
             for card in CARDS.values() for t in (BF16, Q4_K) for n_tok, m, n_head, k in SHAPES}  # fmt: skip
    assert taken == set(module.VARIANTS)


def test_turing_multiplies_many_tokens_in_f16() -> None:
    w, x, run = weight(Q8_0, 9, 96), rows(20, 96), ShimRun(0, CARDS[75])
    x[3, :2] = 1e9, -1e9
    out = np.full((20, 9), np.nan, np.float32)
    matmul(run, upload(run, w), x, out)
    x[3, :2] = 65504, -65504
    assert_close(out, x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=1e-6)


@pytest.mark.parametrize("type_id", ALL)
def test_a_row_has_the_bits_it_has_alone(type_id: int) -> None:
    w, x = weight(type_id, 21, 512), rows(5, 512)
    alone = np.concatenate([product(w, x[i : i + 1]) for i in range(5)])
    assert np.array_equal(product(w, x), alone)


def test_rows_of_zeros_give_zeros() -> None:
    assert not product(weight(Q4_K, 5, 256), np.zeros((2, 256), np.float32)).any()


@pytest.mark.parametrize("n_tok", [5, 20])
def test_several_weights_share_x_and_add_to_strided_outs(n_tok: int) -> None:
    a, b, x = weight(Q4_K, 33, 256), weight(Q8_0, 70, 256, seed=2), rows(n_tok, 300)[:, :256]
    memory = rows(n_tok, 110, seed=3)
    before, run = memory.copy(), ShimRun()
    matmul(run, [upload(run, a), upload(run, b)], x, [memory[:, :33], memory[:, 35:105]], accumulate=True)
    assert np.array_equal(memory[:, 33:35], before[:, 33:35]) and np.array_equal(memory[:, 105:], before[:, 105:])
    for w, s in ((a, slice(0, 33)), (b, slice(35, 105))):
        added = memory[:, s].astype(np.float64) - before[:, s]
        assert_close(added, x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=NMSE_INT8)


@pytest.mark.parametrize("n_tok", [1, 3, 17])
@pytest.mark.parametrize("type_id", [F32, Q8_0])
def test_heads(type_id: int, n_tok: int) -> None:
    w, x = weight(type_id, 3, 37, 96), rows(n_tok, 3, 128)[:, :, :96]
    out, run = np.full((n_tok, 3, 37), np.nan, np.float32), ShimRun()
    matmul_heads(run, upload(run, w), x, out)
    expected = np.einsum("hmk,thk->thm", w.values, x.astype(np.float64))
    assert_close(out, expected, rtol=np.inf, nmse=nmse(type_id, n_tok))


@pytest.mark.parametrize("type_id", ALL)
def test_embedding_is_the_dequantised_row(type_id: int) -> None:
    w, tokens = weight(type_id, 9, 512), np.array([3, 8, 0, 3], np.int32)
    out, run = np.zeros((4, 512), np.float32), ShimRun()
    embed_rows(run, upload(run, w), tokens, out)
    assert np.array_equal(out, w.values[tokens].astype(np.float32))


@pytest.mark.parametrize("type_id", ALL)
def test_planes_hold_every_byte_of_the_file_and_begin_aligned(type_id: int) -> None:
    w, f, run = weight(type_id, 9, 256), FORMATS[type_id], ShimRun()
    on_card, n_blocks = upload(run, w), w.data.size // f.nbytes
    planes = on_card.planes
    parts = zip((0, *planes), f.planes)
    packed = np.concatenate([on_card.data[start : start + n_blocks * n] for start, (_, n) in parts])
    assert sum(n for _, n in f.planes) == f.nbytes and all(start % 256 == 0 for start in planes)
    assert np.array_equal(np.bincount(packed, minlength=256)[1:], np.bincount(w.data.ravel(), minlength=256)[1:])


@pytest.mark.parametrize("k, lanes", [(32, 1), (64, 2), (96, 4), (1408, 32), (7168, 32)])
def test_a_row_has_as_many_threads_as_steps_up_to_a_warp(k: int, lanes: int) -> None:
    assert module.geometry(Q8_0, 100, k, 3) == ((-(-100 // (128 // lanes)), 3), lanes)


@pytest.mark.parametrize("x, out", [((3, 64), (3, 36)), ((3, 32), (3, 37)), ((3, 64), (2, 37))])
def test_wrong_shapes_are_refused(x: tuple[int, int], out: tuple[int, int]) -> None:
    run = ShimRun()
    with pytest.raises(ValueError, match="expected|for rows of 32"):
        matmul(run, upload(run, weight(Q8_0, 37, 64)), rows(*x), np.zeros(out, np.float32))


def test_a_type_without_a_kernel_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ggml type 16 has no GPU kernel; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0"):
        upload(
            ShimRun(), SimpleNamespace(type=SimpleNamespace(id=16), shape=(1, 256), data=np.zeros((1, 66), np.uint8))
        )
