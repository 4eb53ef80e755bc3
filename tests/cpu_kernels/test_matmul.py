"""matmul, matmul_heads and embed_rows against float64 products of gguf's dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from weights import F32, Q4_K, Q8_0, Weight, rows, weight

from cpu_kernels import panels
from cpu_kernels.matmul import MAX_DOT_TOKENS, embed_rows, matmul, matmul_heads
from cpu_kernels.quants import FORMATS
from cpu_kernels.threads import Run

ALL = [pytest.param(f.type_id, id=f.name) for f in FORMATS.values()]
# Of sum(error²) to sum(out²). On normal data int8 activations err by 0.5-0.8 % rms, bf16 products of many tokens by
# 0.24 %, int16 activations by 3e-5: doubled and squared
NMSE_INT8, NMSE_BF16, NMSE_INT16, NMSE_F32 = 2.5e-4, 2.5e-5, 4e-9, 1e-12


def product(w: Weight, x: np.ndarray, n_threads: int = 2) -> np.ndarray:
    out = np.full((len(x), w.shape[0]), np.nan, np.float32)
    run = Run(n_threads)
    matmul(run, w, x, out)
    run.sync()
    return out


def nmse(type_id: int, n_tok: int = 1, k: int = 512) -> float:
    if n_tok > MAX_DOT_TOKENS:
        limits = {"int8": NMSE_INT8, "bf16": NMSE_BF16, "int16": NMSE_INT16, "f32": NMSE_F32}
        return limits[panels.kind_of(type_id, k)]
    return NMSE_F32 if FORMATS[type_id].activation == "f32" else NMSE_INT8


@pytest.mark.parametrize("type_id", ALL)
@pytest.mark.parametrize("n_tok", [1, 17])
def test_every_type(type_id, n_tok):
    w, x = weight(type_id, 37, 768), rows(n_tok, 768)
    assert_close(product(w, x), x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=nmse(type_id, n_tok))


@pytest.mark.parametrize("kind", ["bf16", "f32"])
@pytest.mark.parametrize("type_id", ALL)
def test_every_type_in_panels_that_other_cpus_take(type_id, kind, monkeypatch):
    monkeypatch.setattr(panels, "kind_of", lambda type_id, k: kind)
    w, x = weight(type_id, 71, 512), rows(23, 512)
    expected = x.astype(np.float64) @ w.values.T
    assert_close(product(w, x), expected, rtol=np.inf, nmse={"bf16": NMSE_BF16, "f32": NMSE_F32}[kind])


@pytest.mark.parametrize("n_tok", [1, 3, 16, 17, 65, 97])
@pytest.mark.parametrize("k", [32, 64, 96, 128, 352, 1408])
@pytest.mark.parametrize("type_id", [F32, Q8_0])
def test_odd_sizes(type_id, k, n_tok):
    w, x = weight(type_id, 71, k), rows(n_tok, k)
    assert_close(product(w, x), x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=nmse(type_id, n_tok, k))


@pytest.mark.parametrize("m", [5, 600])
@pytest.mark.parametrize("n_tok", [panels.MAX_ROWS, panels.MAX_ROWS + 1, 2 * panels.MAX_ROWS + 50])
def test_more_tokens_than_a_tile_takes(m, n_tok):
    w, x = weight(Q8_0, m, 64), rows(n_tok, 64)
    assert_close(product(w, x), x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=NMSE_INT8)
    assert np.array_equal(product(w, x), product(w, x, n_threads=1))


@pytest.mark.parametrize("type_id", ALL)
def test_a_row_has_the_bits_it_has_alone_and_on_any_number_of_threads(type_id):
    w, x = weight(type_id, 301, 512), rows(16, 512)
    alone = np.concatenate([product(w, x[i : i + 1]) for i in range(16)])
    for n_tok in (2, 3, 5, 7, 13, 16):
        together = product(w, x[:n_tok])
        assert np.array_equal(together, alone[:n_tok])
        assert np.array_equal(together, product(w, x[:n_tok], n_threads=1))


@pytest.mark.parametrize("n_tok", [5, 20])
def test_several_weights_share_x_and_add_to_strided_outs(n_tok):
    a, b, x = weight(Q4_K, 33, 256), weight(Q8_0, 70, 256, seed=2), rows(n_tok, 300)[:, :256]
    memory = rows(n_tok, 110, seed=3)
    before = memory.copy()
    run = Run(2)
    run.workspace(1 << 20)[:] = 0xFF  # NaN
    matmul(run, [a, b], x, [memory[:, :33], memory[:, 35:105]], accumulate=True)
    run.sync()
    assert np.array_equal(memory[:, 33:35], before[:, 33:35]) and np.array_equal(memory[:, 105:], before[:, 105:])
    for w, s in ((a, slice(0, 33)), (b, slice(35, 105))):
        added = memory[:, s].astype(np.float64) - before[:, s]
        assert_close(added, x.astype(np.float64) @ w.values.T, rtol=np.inf, nmse=NMSE_INT8)


@pytest.mark.parametrize("n_tok", [1, 3, 17])
@pytest.mark.parametrize("type_id", [F32, Q8_0])
def test_heads(type_id, n_tok):
    w, x = weight(type_id, 3, 37, 96), rows(n_tok, 3, 128)[:, :, :96]
    out = np.zeros((n_tok, 3, 37), np.float32)
    run = Run(2)
    matmul_heads(run, w, x, out)
    run.sync()
    expected = np.einsum("hmk,thk->thm", w.values, x.astype(np.float64))
    assert_close(out, expected, rtol=np.inf, nmse=nmse(type_id))


@pytest.mark.parametrize("type_id", ALL)
def test_embedding_is_the_dequantised_row(type_id):
    w, tokens = weight(type_id, 9, 512), np.array([3, 8, 0, 3], np.int32)
    out = np.zeros((4, 512), np.float32)
    run = Run(2)
    embed_rows(run, w, tokens, out)
    run.sync()
    assert np.array_equal(out, w.values[tokens].astype(np.float32))


@pytest.mark.parametrize("x, out", [((3, 64), (3, 36)), ((3, 32), (3, 37)), ((3, 64), (2, 37)), ((20, 96), (20, 37))])
def test_wrong_shapes_are_refused(x, out):
    with pytest.raises(ValueError, match="expected"):
        matmul(Run(1), weight(Q8_0, 37, 64), rows(*x), np.zeros(out, np.float32))
