"""Powers of two, at the ends of their range."""

from __future__ import annotations

import numpy as np

from cpu_kernels._jit import kernel
from cpu_kernels.threads import Run


@kernel
def powers(down):
    from cpu_kernels.simd import ld, st, vexp2, vexp2_down

    exp2 = vexp2_down if down else vexp2

    def body(tile, scratch, x, out):
        st(out + 64 * tile, exp2(ld(x + 64 * tile)))

    return body


def exp2(x: list[float] | np.ndarray, down: bool) -> np.ndarray:
    values = np.resize(np.array(x, np.float32), (-(-len(x) // 16), 16))
    out, run = np.empty_like(values), Run(1)
    run.launch(powers(down=down), len(values), (values, out))
    run.sync()
    return out.reshape(-1)[: len(x)]


def test_a_power_of_two_is_right_to_rounding():
    x = np.linspace(-126, 0, 16_000, dtype=np.float32)
    for down in (True, False):
        np.testing.assert_allclose(exp2(x, down), np.exp2(x.astype(np.float64)), rtol=3e-7)
    np.testing.assert_allclose(exp2(-x, False), np.exp2(-x.astype(np.float64)), rtol=3e-7)


def test_what_is_far_below_weighs_nothing():
    for down in (True, False):
        assert not exp2([-150, -1000, -1e30, -np.inf], down).any()
        assert (exp2([-126.5, -140], down) < 2.0**-126).all()
        assert np.isnan(exp2([np.nan], down)).all()
    assert (exp2([128, 1e30, np.inf], False) == np.inf).all()
