"""SwiGLU against float64."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close

from cpu_kernels.ffn import swiglu
from cpu_kernels.threads import Run


@pytest.mark.parametrize("n", [16, 4096, 4112])  # a tile is 4096 values
def test_swiglu_is_silu_of_gate_times_up(n: int) -> None:
    rng = np.random.default_rng(n)
    gate, up = 8 * rng.standard_normal((2, 3, n), dtype=np.float32)
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up  # reference.sigmoid cancels below -20
    out = np.empty_like(gate)
    run = Run(2)
    swiglu(run, gate, up, out)
    run.sync()
    assert_close(out, expected, rtol=5e-6, atol=1e-30)


def test_swiglu_of_large_gates_is_finite() -> None:
    gate = np.repeat(np.array([-200, 200, -88.5, 88.5], np.float32), 4)[None]
    run = Run(1)
    out = np.empty_like(gate)
    swiglu(run, gate, np.ones_like(gate), out)
    run.sync()
    assert_close(out, np.where(gate > 0, gate, 0).astype(np.float64), atol=1e-30)
