"""Rows of the K-cache and their rotation under the shim: as the CPU's, byte for byte where rounding allows it."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances

import cpu_kernels
import gpu_kernels
from gpu_kernels.k_cache import TYPES_K, kernels, row_bytes

SHAPES = [(512, 64), (256, 32), (384, 64)]
EPS = 1e-6

instances(k for t in TYPES_K for shape in SHAPES for k in kernels(t, *shape).values())


def gamma(rank: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(0, 1, rank).astype(np.float32)


def angles(positions: np.ndarray, n_rot: int) -> np.ndarray:
    angle = positions[:, None] * 10000.0 ** -(np.arange(0, n_rot, 2) / n_rot)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def stored(ops: object, run: object, type_k: str, rank: int, n_rot: int, neox: bool = False) -> np.ndarray:
    """(8, row) u8 after storing rows 5, 0 and 2, from wider rows; the others hold 0xAA."""
    kv_a = (3 * np.random.default_rng(rank).standard_normal((3, rank + n_rot + 16), dtype=np.float32))[:, 16:]
    positions = np.array([5, 0, 2], np.int32)
    rows = np.full((8, row_bytes(type_k, rank, n_rot)), 0xAA, np.uint8)
    cos_sin = angles(positions, n_rot)
    ops.k_store(run, kv_a, gamma(rank), EPS, cos_sin, positions, rows, type_k, rank, n_rot, neox)
    run.sync()
    return rows


def values(rows: np.ndarray, type_k: str, rank: int, n_rot: int) -> tuple[np.ndarray, np.ndarray]:
    """(latent, rope) as float64, of q8 the latent's integers"""
    at = rank if type_k == "q8" else 2 * rank
    rope = np.ascontiguousarray(rows[:, at : at + 2 * n_rot])
    latent = np.ascontiguousarray(rows[:, :at])
    if type_k == "f16":
        return latent.view(np.float16).astype(np.float64), rope.view(np.float16).astype(np.float64)
    wide = (rope.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if type_k == "q8":
        return latent.astype(np.float64) - 128, wide
    return (latent.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64), wide


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("rank, n_rot", SHAPES)
@pytest.mark.parametrize("type_k, ulp", [("f16", 2**-10), ("bf16", 2**-7), ("q8", 2**-7)])
def test_rows_are_the_cpu_s(type_k: str, ulp: float, rank: int, n_rot: int, neox: bool) -> None:
    gpu = stored(gpu_kernels, ShimRun(-1), type_k, rank, n_rot, neox)
    cpu = stored(cpu_kernels, cpu_kernels.Run(1), type_k, rank, n_rot, neox)
    written = [5, 0, 2]
    assert (gpu == cpu).mean() > 0.998  # else sums in another order would have moved many to the next value
    assert np.array_equal(np.delete(gpu, written, axis=0), np.delete(cpu, written, axis=0))
    (latent, rope), (e_latent, e_rope) = (values(r[written], type_k, rank, n_rot) for r in (gpu, cpu))
    assert_close(rope, e_rope, rtol=1.01 * ulp, atol=1e-6)
    assert_close(latent, e_latent, **({"atol": 1.0} if type_k == "q8" else {"rtol": 1.01 * ulp, "atol": 1e-6}))
    if type_k == "q8":
        at = rank + 2 * n_rot
        scales = [np.ascontiguousarray(r[written, at : at + 4]).view(np.float32) for r in (gpu, cpu)]
        assert_close(scales[0], scales[1], rtol=1e-6)


@pytest.mark.parametrize("type_k", TYPES_K)
def test_a_latent_of_zeros_stores_zeros(type_k: str) -> None:
    rows = np.zeros((1, row_bytes(type_k, 256, 32)), np.uint8)
    zeros = np.zeros((1, 288), np.float32)
    gpu_kernels.k_store(
        ShimRun(), zeros, np.ones(256, np.float32), EPS, zeros[:, :32], np.zeros(1, np.int32), rows, type_k, 256, 32
    )
    latent, rope = values(rows, type_k, 256, 32)
    assert not latent.any() and not rope.any()


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize("type_k", TYPES_K)
def test_a_shift_gives_the_cpu_s_rows(type_k: str, neox: bool) -> None:
    before = stored(cpu_kernels, cpu_kernels.Run(1), type_k, 256, 32)
    at = 256 if type_k == "q8" else 512
    rope = np.ascontiguousarray(before[[5, 0, 2], at : at + 64]).view(np.uint16)
    cos_sin, after = angles(np.array([-7, 3, 100]), 32), []
    for ops, run in ((gpu_kernels, ShimRun(1)), (cpu_kernels, cpu_kernels.Run(1))):
        rows = before.copy()
        ops.k_shift(run, rope, cos_sin, rows, type_k, 256, 32, neox)
        run.sync()
        after.append(rows)
    gpu, cpu = after
    assert np.array_equal(np.delete(gpu, np.s_[at : at + 64], axis=1), np.delete(before, np.s_[at : at + 64], axis=1))
    assert np.array_equal(gpu[3:], before[3:]) and (gpu == cpu).mean() > 0.999
    ulp = 2**-10 if type_k == "f16" else 2**-7
    assert_close(values(gpu, type_k, 256, 32)[1][:3], values(cpu, type_k, 256, 32)[1][:3], rtol=1.01 * ulp, atol=1e-6)


@pytest.mark.parametrize("rank", [rank for rank, _ in SHAPES])
def test_query_and_output_are_rotated_as_the_cpu_does(rank: int) -> None:
    n_rot = dict(SHAPES)[rank]
    rng = np.random.default_rng(rank)
    q = rng.standard_normal((2, 3, rank + n_rot), dtype=np.float32)
    x = rng.standard_normal((2, 3, rank), dtype=np.float32)
    results = []
    for ops, run in ((gpu_kernels, ShimRun(-3)), (cpu_kernels, cpu_kernels.Run(1))):
        a, b = q.copy(), x.copy()
        ops.rotate_query(run, a, gamma(rank), rank)
        ops.unrotate_output(run, b, gamma(rank))
        run.sync()
        results.append((a, b))
    for gpu, cpu in zip(*results):
        assert_close(gpu, cpu, rtol=1e-5, atol=1e-4)
    assert np.array_equal(results[0][0][:, :, rank:], q[:, :, rank:])


def test_rows_too_narrow_are_refused() -> None:
    ones = np.ones((1, 160), np.float32)
    args = (ones, ones[0, :128].copy(), EPS, ones[:, :32], np.zeros(1, np.int32), np.zeros((4, 256), np.uint8))
    with pytest.raises(ValueError, match="rows of 256 bytes"):
        gpu_kernels.k_store(ShimRun(), *args, "f16", 128, 32)
