"""rms_norm, rope, swiglu and route under the shim, against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close
from shim import ShimRun
from weights import rows

from engine import reference
from gpu_kernels import rms_norm, rope, route, swiglu

POSITIONS = np.array([0, 1, 4095])


@pytest.mark.parametrize("n", [16, 300, 2048])
def test_rms_norm_is_the_reference_s_in_place_and_of_strided_rows(n: int) -> None:
    memory, weight = rows(3, n + 5), rows(n, seed=2)
    x = memory[:, :n]
    expected = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    rest = memory[:, n:].copy()
    rms_norm(ShimRun(-1), x, weight, 1e-6, x)
    assert_close(x, expected, rtol=2e-6, atol=1e-7)
    assert np.array_equal(memory[:, n:], rest)


@pytest.mark.parametrize("n_rot", [32, 64])
@pytest.mark.parametrize("neox", [False, True])
def test_rope_is_the_reference_s(neox: bool, n_rot: int) -> None:
    q = rows(3, 4, 16 + n_rot)
    inv_freq = 10000.0 ** -(np.arange(0, n_rot, 2) / n_rot)
    angle = POSITIONS[:, None] * inv_freq
    cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    x = q[:, :, 16:].astype(np.float64)
    rope(ShimRun(1), q[:, :, 16:], cos_sin, q[:, :, 16:], neox=neox)
    expected = reference.rope(x, POSITIONS, inv_freq, style="neox" if neox else "norm")
    assert_close(q[:, :, 16:], expected, atol=1e-6)
    assert np.array_equal(q[:, :, :16], rows(3, 4, 16 + n_rot)[:, :, :16])


@pytest.mark.parametrize("n", [16, 1040])
def test_swiglu_is_silu_of_gate_times_up(n: int) -> None:
    gate, up = 4 * rows(3, n), rows(3, n, seed=3)
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    swiglu(ShimRun(), gate, up, gate)
    assert_close(gate, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "n_expert, n_used, gating, biased, n_group, n_group_used",
    [(64, 6, "softmax", False, 1, 1), (64, 6, "sigmoid", True, 8, 3), (20, 4, "softmax", False, 4, 2)],
)
def test_route_is_the_reference_s(
    norm: bool, n_expert: int, n_used: int, gating: str, biased: bool, n_group: int, n_group_used: int
) -> None:
    logits = rows(5, n_expert)
    bias = rows(n_expert, seed=2) * 0.1 if biased else None
    ids, weights = np.full((5, n_used), -1, np.int32), np.full((5, n_used), np.nan, np.float32)
    route(ShimRun(-1), logits, bias, gating, n_group, n_group_used, norm, 2.5, ids, weights)
    e_ids, e_weights = reference.route(
        logits.astype(np.float64), n_used, gating=gating, bias=bias, n_groups=n_group, n_group_used=n_group_used,
        norm=norm, scale=2.5,
    )  # fmt: skip
    assert np.array_equal(ids, e_ids)
    assert_close(weights, e_weights, rtol=2e-6)


def test_of_equal_experts_and_groups_the_first_are_chosen() -> None:
    ids, weights = np.zeros((2, 3), np.int32), np.zeros((2, 3), np.float32)
    route(ShimRun(), np.zeros((2, 64), np.float32), None, "softmax", 4, 2, False, 1.0, ids, weights)
    assert ids.tolist() == [[0, 1, 2]] * 2
