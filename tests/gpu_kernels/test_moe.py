"""experts under the shim, against float64 products of dequantised weights."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun, instances
from weights import BF16, F32, Q4_K, Q6_K, Q8_0, Weight, rows, weight

from engine import reference
from gpu_kernels import experts, upload

instances(importlib.import_module("gpu_kernels.matmul").matvec(t, 1) for t in (F32, BF16, Q8_0, Q4_K, Q6_K))


def added(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, mats: list[Weight], order: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """What experts adds, and what it should."""
    before = rows(*x.shape, seed=9)
    out, run = before.copy(), ShimRun(order)
    experts(run, x, ids, weights, *(upload(run, w) for w in mats), out)
    gate, up, down = mats
    expected = reference.moe(
        x.astype(np.float64), ids, weights, lambda e: (gate.values[e], up.values[e], down.values[e])
    )
    return out.astype(np.float64) - before, expected


def choice(n_tok: int, n_expert: int, n_used: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(rows(n_tok, n_expert, seed=5), axis=1)[:, :n_used].astype(np.int32)
    return np.ascontiguousarray(ids), np.abs(rows(n_tok, n_used, seed=6))


@pytest.mark.parametrize("n_tok", [1, 3])
@pytest.mark.parametrize(
    "types",
    [(Q8_0, Q8_0, Q8_0), (Q4_K, Q4_K, Q6_K), (BF16, BF16, Q8_0), (Q8_0, F32, F32)],
    ids=["Q8_0", "Q4_K_Q6_K", "BF16_Q8_0", "mixed"],
)
def test_experts_are_added(types: tuple[int, int, int], n_tok: int) -> None:
    n_embd, n_ff = 256, 256 if types[2] == Q6_K else 96
    shapes = [(7, n_ff, n_embd), (7, n_ff, n_embd), (7, n_embd, n_ff)]
    mats = [weight(t, *shape, seed=i) for i, (t, shape) in enumerate(zip(types, shapes))]
    found, expected = added(rows(n_tok, n_embd), *choice(n_tok, 7, 3), mats, -1)
    assert_close(found, expected, rtol=np.inf, nmse=1e-3)  # int8 activations twice


def test_experts_in_f32_are_exact() -> None:
    mats = [weight(F32, 9, *shape, seed=i) for i, shape in enumerate([(96, 64), (96, 64), (64, 96)])]
    found, expected = added(rows(5, 64), *choice(5, 9, 2), mats)
    assert_close(found, expected, rtol=np.inf, nmse=1e-12)


def test_experts_of_other_shapes_are_refused() -> None:
    run = ShimRun()
    mats = [upload(run, weight(F32, 2, *shape)) for shape in ((32, 64), (32, 64), (32, 64))]
    with pytest.raises(ValueError, match="experts of shapes"):
        experts(run, rows(1, 64), np.zeros((1, 1), np.int32), rows(1, 1), *mats, rows(1, 64))
