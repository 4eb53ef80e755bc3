"""Rows of the K-cache: what k_store writes, and the rotation of type_k q8."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close

from cpu_kernels.k_cache import k_store, rotate_query, unrotate_output
from cpu_kernels.threads import Run
from engine import reference

EPS = 1e-6
SHAPES = [(512, 64), (256, 32), (64, 32), (192, 64), (96, 32)]


def stored(
    type_k: str, rank: int, n_rot: int, neox: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rows u8 of 8 tokens, positions, expected ĉ, expected rope) after storing three tokens."""
    rng = np.random.default_rng(rank)
    kv_a = 3 * rng.standard_normal((3, rank + n_rot), dtype=np.float32)
    positions = np.array([5, 0, 2], np.int32)
    inv_freq = 10000.0 ** -(np.arange(0, n_rot, 2) / n_rot)
    angle = positions[:, None] * inv_freq
    cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    used = rank + 2 * n_rot + 4 if type_k == "q8" else 2 * (rank + n_rot)
    rows = np.full((8, -(-used // 16) * 16), 0xAA, np.uint8)
    run = Run(1)
    k_store(run, kv_a, gamma(rank), EPS, cos_sin, positions, rows, type_k, rank, n_rot, neox)
    run.sync()
    x = kv_a.astype(np.float64)
    latent = reference.rms_norm(x[:, :rank], np.ones(rank), EPS)
    k_rope = reference.rope(x[:, rank:], positions, inv_freq, style="neox" if neox else "norm")
    return rows, positions, latent, k_rope


def gamma(rank: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(0, 1, rank).astype(np.float32)


def bf16(u8: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(u8).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def hadamard(rank: int) -> np.ndarray:
    """The matrix that q8 rotates by: blocks of the largest power of two that divides rank."""
    block, h = rank & -rank, np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(rank // block), h / np.sqrt(block))


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("rank, n_rot", SHAPES)
@pytest.mark.parametrize("type_k, step", [("f16", 2**-11), ("bf16", 2**-8)])
def test_16_bit_rows_hold_normed_latent_and_turned_rope(
    type_k: str, step: float, rank: int, n_rot: int, neox: bool
) -> None:
    rows, positions, latent, k_rope = stored(type_k, rank, n_rot, neox)
    used = np.ascontiguousarray(rows[positions, : 2 * (rank + n_rot)])
    found = used.view(np.float16).astype(np.float64) if type_k == "f16" else bf16(used)
    expected = np.concatenate([latent * gamma(rank), k_rope], axis=1)
    assert_close(found, expected, rtol=1.01 * step, atol=2e-6)  # half a unit in the last place, f32 noise near 0


@pytest.mark.parametrize("rank, n_rot", SHAPES)
def test_q8_rows_hold_the_rotated_latent_before_gamma(rank: int, n_rot: int) -> None:
    rows, positions, latent, k_rope = stored("q8", rank, n_rot)
    row = rows[positions]
    scale = np.ascontiguousarray(row[:, rank + 2 * n_rot : rank + 2 * n_rot + 4]).view(np.float32).astype(np.float64)
    rotated = latent @ hadamard(rank)
    assert_close(scale[:, 0], np.abs(rotated).max(axis=1) / 127, rtol=1e-5)
    assert (np.abs((row[:, :rank].astype(float) - 128) * scale - rotated) <= 0.501 * scale).all()
    assert_close(bf16(row[:, rank : rank + 2 * n_rot]), k_rope, rtol=1.01 * 2**-8, atol=2e-6)


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_no_other_row_is_written(type_k: str) -> None:
    rows, positions, _, _ = stored(type_k, 64, 32)
    others = np.setdiff1d(np.arange(len(rows)), positions)
    assert (rows[others] == 0xAA).all()


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_a_latent_of_zeros_stores_zeros(type_k: str) -> None:
    rows = np.zeros((1, 256), np.uint8)
    ones = np.ones(64, np.float32)
    cos_sin = np.zeros((1, 32), np.float32)
    run = Run(1)
    k_store(
        run, np.zeros((1, 96), np.float32), ones, EPS, cos_sin, np.zeros(1, np.int32), rows, type_k, 64, 32
    )  # fmt: skip
    run.sync()
    if type_k == "q8":
        assert (rows[0, :64] == 128).all() and np.isfinite(rows[0, 128:132].view(np.float32)).all()
    else:
        assert not rows.any()


@pytest.mark.parametrize("rank", [512, 256, 64, 192, 96])
def test_query_and_output_are_rotated_by_the_same_matrix(rank: int) -> None:
    rng = np.random.default_rng(rank)
    q = rng.standard_normal((2, 3, rank + 32), dtype=np.float32)
    x = rng.standard_normal((2, 3, rank), dtype=np.float32)
    h, g = hadamard(rank), gamma(rank).astype(np.float64)
    latent = (q[:, :, :rank] * g) @ h
    expected_q = np.concatenate([latent, q[:, :, rank:]], axis=-1)
    expected_x = g * (x @ h.T)
    run = Run(2)
    rotate_query(run, q, gamma(rank), rank)
    unrotate_output(run, x, gamma(rank))
    run.sync()
    assert_close(q, expected_q, rtol=1e-5, atol=1e-4)
    assert_close(x, expected_x, rtol=1e-5, atol=1e-4)


def test_rows_too_narrow_are_refused() -> None:
    ones = np.ones((1, 96), np.float32)
    with pytest.raises(ValueError, match="rows of 128 bytes"):
        k_store(
            Run(1), ones, ones[0, :64].copy(), EPS, ones[:, :32], np.zeros(1, np.int32),
            np.zeros((4, 128), np.uint8), "f16", 64, 32,
        )  # fmt: skip
