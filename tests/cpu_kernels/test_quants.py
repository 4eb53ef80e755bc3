"""Every weight format against gguf's dequantiser: decoded bits, and dot products of rows."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from compare import assert_close
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from synthetic import quantise

from cpu_kernels.quants import FORMATS, decoder, quantise_rows, record_bytes, row_bytes, row_sums
from cpu_kernels.threads import Run

ALL = [pytest.param(f.type_id, id=f.name) for f in FORMATS.values()]
INT8 = [pytest.param(f.type_id, id=f.name) for f in FORMATS.values() if f.activation != "f32"]
FLOATS = [pytest.param(f.type_id, id=f.name) for f in FORMATS.values() if f.activation == "f32"]
# bytes of a block that are f16 numbers; all others may hold any bits
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)} | dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))


def random_weights(type_id: int, n_rows: int, k: int, seed: int = 0) -> np.ndarray:
    """(n_rows, row bytes) u8: random bits with scales of ordinary size, negative ones too."""
    f = FORMATS[type_id]
    rng = np.random.default_rng(seed)
    if f.activation == "f32":
        return quantise(rng.standard_normal((n_rows, k)), GGMLQuantizationType(type_id))
    blocks = rng.integers(0, 256, (n_rows * k // f.block, f.nbytes), np.uint8)
    for at in HALVES.get(f.name, (0,)):
        scale = rng.uniform(0.001, 0.01, len(blocks)) * rng.choice([-1, 1], len(blocks))
        blocks[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(n_rows, -1)


def dequantise(type_id: int, weights: np.ndarray) -> np.ndarray:
    return quants.dequantize(weights, GGMLQuantizationType(type_id))


@functools.cache
def compiled_decoder(type_id: int):
    """(w, out, n blocks): decode to f32."""
    from numba import njit, types

    from cpu_kernels.simd import A, instruction, offset, store

    block, nbytes = FORMATS[type_id].block, FORMATS[type_id].nbytes

    @instruction(types.void, A, A)
    def decode(b, w, out):
        columns = []
        for c, v in decoder(type_id)(b, w):
            columns.append(c)
            store(b, v, offset(b, out, 4 * c))
        assert columns == list(range(0, block, 16))

    @njit
    def blocks(w, out, n):
        for i in range(n):
            decode(w + i * nbytes, out + i * block * 4)

    return blocks


@functools.cache
def compiled_sums(type_id: int, n: int):
    from numba import njit

    row = row_sums(type_id, n)
    return njit(lambda w, w_row, m, xs, k, out: row(w, w_row, m, xs, k, out))


def at_the_end(data: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last of a page that is followed by one that may not be read."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    size = (data.nbytes + page - 1) // page * page
    memory = np.frombuffer(mmap.mmap(-1, size + page), np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert protect(memory.ctypes.data + size, page, 0) == 0
    out = memory[size - data.nbytes : size]
    out[:] = data.reshape(-1)
    return out


def quantised(activation: str, x: np.ndarray) -> np.ndarray:
    """(n_rows, record bytes) u8; memory starts as 0xAA, so that what is not written shows."""
    n_rows = x.size // x.shape[-1]
    out = np.full((n_rows, record_bytes(activation, x.shape[-1])), 0xAA, np.uint8)
    run = Run(2)
    quantise_rows(run, activation, x, out)
    run.sync()
    return out


def records(type_id: int, x: np.ndarray) -> np.ndarray:
    """x (n_rows, k) f32 as the format's dot takes it."""
    return x if FORMATS[type_id].activation == "f32" else quantised(FORMATS[type_id].activation, x)


def sums(type_id: int, n: int, weights: np.ndarray, activations: np.ndarray, k: int) -> np.ndarray:
    """(n, rows of weights, 16) f32"""
    out = np.full((n, 16, 16), np.nan, np.float32)
    xs = np.array([x.ctypes.data for x in activations], np.int64)
    args = (weights.ctypes.data, weights.strides[0], len(weights), xs.ctypes.data, k, out.ctypes.data)
    compiled_sums(type_id, n)(*args)
    return out[:, : len(weights)]


def dots(type_id: int, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Every weight row times x (k,)."""
    record = records(type_id, x[None])
    parts = [sums(type_id, 1, weights[i : i + 16], record, x.size)[0] for i in range(0, len(weights), 16)]
    return np.concatenate(parts).sum(1, dtype=np.float32)


@pytest.mark.parametrize("type_id", ALL)
def test_the_table_agrees_with_gguf(type_id):
    f = FORMATS[type_id]
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    assert f.name == GGMLQuantizationType(type_id).name
    assert (f.block, f.nbytes) == (block * (f.block // block), nbytes * (f.block // block))
    assert row_bytes(type_id, 512) == 512 // block * nbytes


def test_a_row_of_half_a_block_is_refused():
    with pytest.raises(ValueError, match="a row of 1408 values is not made of Q4_K blocks of 256"):
        row_bytes(12, 1408)


@pytest.mark.parametrize("type_id", ALL)
def test_blocks_decode_to_the_bits_of_gguf(type_id):
    k = 256 * 37
    weights = random_weights(type_id, 1, k)
    out = np.empty(k, np.float32)
    packed = at_the_end(weights)
    compiled_decoder(type_id)(packed.ctypes.data, out.ctypes.data, k // FORMATS[type_id].block)
    np.testing.assert_array_equal(out.view(np.uint32), dequantise(type_id, weights)[0].view(np.uint32))


@pytest.mark.parametrize("type_id", FLOATS)
@pytest.mark.parametrize("k", [32, 160, 1408])
def test_dot_of_floats_is_exact_to_rounding(type_id, k):
    weights = random_weights(type_id, 9, k)
    x = np.random.default_rng(1).standard_normal(k).astype(np.float32)
    exact = dequantise(type_id, weights).astype(np.float64)
    allowed = 1e-6 * (np.abs(exact) @ np.abs(x)).max()
    assert_close(dots(type_id, weights, x), exact @ x, atol=allowed)


def sizes(type_id: int) -> list[int]:
    return [256, 2048, 256 * 11] if FORMATS[type_id].block == 256 else [32, 64, 96, 128, 1408, 10944]


@pytest.mark.parametrize("type_id", INT8)
def test_int8_dot_is_exact_for_the_quantised_activations(type_id):
    for k in sizes(type_id):
        weights = random_weights(type_id, 7, k, seed=k)
        x = np.random.default_rng(k).standard_normal(k).astype(np.float32)
        block = 32 if FORMATS[type_id].activation == "q8_32" else 256
        groups = x.reshape(-1, block).astype(np.float64)
        scale = np.abs(groups).max(1, keepdims=True) / 127
        rounded = (np.rint(groups / scale) * scale).reshape(-1)
        exact = dequantise(type_id, weights).astype(np.float64)
        # f32 additions of sums that are integers; a tie that rounds the other way would show as 1e-3
        allowed = 2e-6 * (np.abs(exact) @ np.abs(rounded)).max()
        assert_close(dots(type_id, weights, x), exact @ rounded, atol=allowed)


@pytest.mark.parametrize("type_id", INT8)
def test_int8_dot_is_near_the_exact_one(type_id):
    k = 2048
    weights = random_weights(type_id, 64, k)
    x = np.random.default_rng(1).standard_normal(k).astype(np.float32)
    exact = dequantise(type_id, weights).astype(np.float64) @ x
    # rms error over rms: 0.7 % measured with a scale per 256, 0.5 % with one per 32; doubled
    limit = 1e-2 if FORMATS[type_id].activation == "q8_32" else 1.4e-2
    assert_close(dots(type_id, weights, x), exact, atol=np.inf, nmse=limit**2)


@pytest.mark.parametrize("type_id", ALL)
def test_nothing_after_a_weight_row_is_read(type_id):
    for k in sizes(type_id)[:3]:
        weights = random_weights(type_id, 1, k)
        x = np.random.default_rng(1).standard_normal(k).astype(np.float32)
        assert dots(type_id, at_the_end(weights)[None], x)[0] == dots(type_id, weights, x)[0]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("type_id", ALL)
def test_a_row_has_the_same_sums_beside_others(type_id, n):
    for k in sizes(type_id)[-2:]:
        weights = random_weights(type_id, 3, k)
        x = records(type_id, np.random.default_rng(1).standard_normal((n, k)).astype(np.float32))
        alone = np.concatenate([sums(type_id, 1, weights, x[t : t + 1], k) for t in range(n)])
        assert np.array_equal(sums(type_id, n, weights, x, k), alone)


@pytest.mark.parametrize("activation", ["q8_256", "q8_nibbles", "q8_32"])
def test_extreme_codes_do_not_saturate(activation):
    """All weights and activations at their limits: sums of pairs must not clip at 16 bits."""
    for f in FORMATS.values():
        if f.activation != activation:
            continue
        for fill in (0x00, 0x7F, 0x80, 0xFF):
            k = 256
            weights = np.full((1, row_bytes(f.type_id, k)), fill, np.uint8)
            blocks = weights.reshape(-1, f.nbytes)
            for at in HALVES.get(f.name, (0,)):
                blocks[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
            for x in (np.ones(k, np.float32), np.where(np.arange(k) % 4 < 2, -1, 1).astype(np.float32)):
                exact = dequantise(f.type_id, weights).astype(np.float64) @ x
                size = np.abs(dequantise(f.type_id, weights)).sum()
                assert_close(dots(f.type_id, weights, x), exact, atol=1e-5 * size)


@pytest.mark.parametrize(("activation", "k"), [("q8_256", 2304), ("q8_nibbles", 2304), ("q8_32", 32), ("q8_32", 2144)])
def test_rows_with_heads_and_strides_quantise_as_plain_rows(activation, k):
    x = np.random.default_rng(0).standard_normal((3, 5, k + 64)).astype(np.float32)
    x[1, 2, :256] = 0
    strided = x[:, 1:4, 32 : 32 + k]
    together = quantised(activation, strided)
    for i, row in enumerate(strided.reshape(-1, k)):
        np.testing.assert_array_equal(together[i], quantised(activation, row[None].copy())[0])


def test_wrong_rows_are_refused():
    x, out = np.zeros((2, 256), np.float32), np.zeros((2, 320), np.uint8)
    for bad, name, into in [
        (x[:, :224], "q8_256", out),
        (x[:, ::2], "q8_32", out),
        (x.astype(np.float64), "q8_256", out),
        (x, "q8_256", out[:1]),
    ]:
        with pytest.raises(ValueError):
            quantise_rows(Run(1), name, bad, into)
